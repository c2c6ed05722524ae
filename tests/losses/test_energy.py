"""The energy of a wavefunction: on a few states that can be summed over, and against its formulas."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, flat, mlp, parameters, random
from jax.flatten_util import ravel_pytree
from reference import jacobians

import kfax


STATES = random(1, 7, 2)
HERMITIAN = random(2, 7, 7) + 1j * random(3, 7, 7)
HERMITIAN = HERMITIAN + HERMITIAN.conj().T
MODELS = {"real": mlp(jax.random.key(0), (2, 4, 1)), "complex": mlp(jax.random.key(0), (2, 4, 2))}


def log_psi(model, states):
    f = jax.vmap(model)(states)
    return f[:, 0] if f.shape[1] == 1 else f


def amplitudes(model):
    f = log_psi(model, STATES)
    return jnp.exp(f) if f.ndim == 1 else jnp.exp(f[:, 0] + 1j * f[:, 1])


def loss_fn(model, batch):
    states, energies, weights = batch
    return kfax.energy_loss(log_psi(model, states), energies, clip=None, weights=weights)


def case_of(kind):
    """A model, the matrix of its Hamiltonian, and all states as a batch, each with its probability."""
    model = MODELS[kind]
    hamiltonian = HERMITIAN.real if kind == "real" else HERMITIAN
    psi = amplitudes(model)
    return model, hamiltonian, (STATES, hamiltonian @ psi / psi, jnp.abs(psi) ** 2)


@pytest.mark.parametrize("kind", MODELS)
def test_value_and_gradient_are_those_of_the_energy(kind):
    model, hamiltonian, batch = case_of(kind)

    def energy(model):
        psi = amplitudes(model)
        return (psi.conj() @ hamiltonian @ psi).real / jnp.sum(jnp.abs(psi) ** 2)

    value, gradient = eqx.filter_value_and_grad(lambda m: loss_fn(m, batch).value())(model)
    expected_value, expected = eqx.filter_value_and_grad(energy)(model)
    assert_close(value, expected_value)
    assert_close(flat(parameters(gradient)), flat(parameters(expected)))  # that of a real bias vanishes


@pytest.mark.parametrize("kind", MODELS)
def test_curvature_is_the_fisher_information_or_the_quantum_metric(kind):
    model, _, batch = case_of(kind)
    vector, unravel = ravel_pytree(parameters(model))
    probabilities = batch[2] / batch[2].sum()

    def log_probabilities(v):
        return jax.nn.log_softmax(2 * jnp.log(jnp.abs(amplitudes(eqx.combine(unravel(v), model)))))

    scores = jax.jacrev(log_probabilities)(vector)
    fisher = jnp.einsum("n,ni,nj->ij", probabilities, scores, scores)
    rows = jacobians(lambda p: log_psi(eqx.combine(p, model), STATES), parameters(model))
    centered = rows - jnp.einsum("n,nki->ki", probabilities, rows)
    metric = 4 * jnp.einsum("n,nki,nkj->ij", probabilities, centered, centered)
    if kind == "real":
        assert_close(fisher, metric)
    estimator = kfax.SampleSpaceCurvature(centered=True)
    update = eqx.filter_jit(lambda m, b: estimator.update(estimator.init(m), loss_fn, m, b))
    state, p = update(model, batch), parameters(model)
    assert_close(eqx.filter_jit(estimator.to_dense)(state, p), metric)
    # The gradient has coordinates: nothing is left for the other form of the inverse.
    gradient = parameters(eqx.filter_grad(lambda m: loss_fn(m, batch).value())(model))
    assert_close(flat(state.batch.gradient), flat(gradient))
    exact = kfax.ExplicitExactCurvature()
    plain = eqx.filter_jit(lambda m, b: exact.update(exact.init(m), loss_fn, m, b))(model, batch)
    assert_close(plain.average.value, 4 * jnp.einsum("n,nki,nkj->ij", probabilities, rows, rows))


@pytest.mark.parametrize("shape", [(6,), (6, 2)])
def test_it_is_what_it_says_of_itself(shape):
    energies = random(5, 6) if len(shape) == 1 else random(5, 6) + 1j * random(6, 6)
    loss = kfax.energy_loss(random(4, *shape), energies, weights=jnp.arange(1.0, 7))
    moved = eqx.tree_at(lambda one: one.outputs, loss, loss.outputs + random(7, *shape))
    for each in (loss, moved):
        assert kfax.check_loss(each, key=jax.random.key(0)) == ()


def test_clipping():
    energies = jnp.array([-1.0, 0.0, 1.0, 2.0, 98.0])
    loss = kfax.energy_loss(jnp.zeros(5), energies, clip=2.0)
    clipped = jnp.array([-1.0, 0.0, 1.0, 2.0, 1 + 2 * (2 + 1 + 0 + 1 + 97) / 5])
    assert_close(loss.gradient(), 2 * (clipped - clipped.mean()))
    assert_close(loss.value(), energies.mean())
    apart = kfax.energy_loss(jnp.zeros((5, 2)), energies + 1j * energies[::-1], clip=2.0)
    assert_close(apart.gradient()[:, 0], loss.gradient())
    assert_close(apart.gradient()[:, 1], loss.gradient()[::-1])


def test_what_does_not_fit():
    for outputs, energies, match in (
        (jnp.zeros((5, 3)), jnp.zeros(5), r"\(n, 2\), got \(5, 3\)"),
        (jnp.zeros(5), jnp.zeros((5, 1)), "one number for each example"),
        (jnp.zeros(5), 1j * jnp.zeros(5), "need both parts"),
        (jnp.zeros(5, int), jnp.zeros(5), "real floating-point numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            kfax.energy_loss(outputs, energies)
    with pytest.raises(ValueError, match="`clip` must be positive"):
        kfax.energy_loss(jnp.zeros(5), jnp.zeros(5), clip=0.0)

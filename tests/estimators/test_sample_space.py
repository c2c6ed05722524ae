"""Solves in the space of examples, against dense ones; and the momentum of SPRING, against its definition."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import grid, make_case
from exact_cases import like, SOURCES, truth
from helpers import as_it_is, assert_close, flat, mlp, parameters, random
from jax.flatten_util import ravel_pytree
from reference import ggn, jacobians, squared_loss

import kfax


MODEL = mlp(jax.random.key(3), (2, 8, 1))  # 33 parameters
INVERSIONS = {"cholesky": kfax.Cholesky(), "eigh": kfax.Eigh()}


def squared(model, batch):
    return kfax.squared_error(jax.vmap(model)(batch[0]), batch[1])


def updated(estimator, loss_fn, model, batch, **options):
    run = eqx.filter_jit(lambda m, b: estimator.update(estimator.init(m), loss_fn, m, b, **options))
    return run(model, batch)


def unlike(model, vector):
    """A vector of numbers as a PyTree like the parameters."""
    return ravel_pytree(parameters(model))[1](vector)


@grid(thin=2, inversion=INVERSIONS, max_numbers=[2**24, 300], source=["ggn", "fisher", "empirical"])
def test_solves_are_dense_solves(inversion, max_numbers, source):
    weights = jnp.array([1.0, 0.5, 0.0, 2.0, 1.5, 1.0])
    case = make_case("mlp", "softmax", weights=weights)
    model = kfax.untag(case.model)

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1], weights=batch[2])

    estimator = kfax.SampleSpaceCurvature(SOURCES[source], inversion=INVERSIONS[inversion], max_numbers=max_numbers)
    batch = (*case.batch, weights)
    p, v, expected = parameters(model), kfax.untag(like(case, 1)), truth(case, source, weights)
    gradient = parameters(eqx.filter_grad(lambda m: loss_fn(m, batch).value())(model))
    state = updated(estimator, loss_fn, model, batch)
    eye = jnp.eye(len(expected))

    @eqx.filter_jit
    def results(state):
        first, later = estimator.refresh(state, p, 0.1), estimator.redamp(estimator.refresh(state, p, 0.1), p, 0.5)
        solved = [estimator.solve(s, u) for s in (state, first, later) for u in (gradient, v)]
        return [flat(u) for u in (*solved, estimator.multiply(state, v), estimator.power(state, v, -0.5, 0.1))]

    found = results(state)
    assert not jnp.any(jnp.stack(found[:2]))
    for number, solved in zip((0.1, 0.5 if inversion == "eigh" else 0.1), (found[2:4], found[4:6]), strict=True):
        for u, x in zip((gradient, v), solved, strict=True):
            assert_close(x, jnp.linalg.solve(expected + number * eye, flat(u)))
    assert_close(found[6], expected @ flat(v))
    values, vectors = jnp.linalg.eigh(expected)
    assert_close(found[7], (vectors * (jnp.maximum(values, 0) + 0.1) ** -0.5) @ vectors.T @ flat(v))
    assert_close(jnp.sort(estimator.eigenvalues(state, p)), jnp.maximum(values, 0))
    assert_close(flat(estimator.as_operator(state, p, 0.3).mv(v)), expected @ flat(v) + 0.3 * flat(v))


def test_the_gradient_keeps_its_digits_where_the_damping_is_small():
    """The other form of the inverse leaves few of them at this λ, and a dense one none."""
    x, y = random(1, 12, 2), random(2, 12, 1)
    estimator = kfax.SampleSpaceCurvature()

    @eqx.filter_jit
    def solve(model, batch):
        state = estimator.update(estimator.init(model), squared, model, batch)
        gradient = parameters(eqx.filter_grad(lambda m: squared(m, batch).value())(model))
        return flat(estimator.solve(estimator.refresh(state, gradient, 1e-9), gradient))

    rows = np.asarray(
        jacobians(lambda p: jax.vmap(eqx.combine(p, MODEL))(x), parameters(MODEL))[:, 0] * np.sqrt(2 / 12)
    )
    left, s, right = np.linalg.svd(rows, full_matrices=False)
    residuals = np.asarray(jax.vmap(MODEL)(x) - y)[:, 0] * np.sqrt(2 / 12)
    expected = right.T @ (s / (s**2 + 1e-9) * (left.T @ residuals))
    # Singular values down to 1e-4 of the largest one; a rounding error of the kernel is 1e-16 of that.
    assert_close(solve(MODEL, (x, y)), jnp.asarray(expected), tolerance=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_centered_rows_make_a_covariance(weighted):
    x, y = random(1, 6, 2), random(2, 6, 1)
    weights = jnp.array([1.0, 0.5, 0.0, 2.0, 1.5, 1.0]) if weighted else jnp.ones(6)

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(model)(batch[0]), batch[1], weights=weights if weighted else None)

    rows = jacobians(lambda p: jax.vmap(eqx.combine(p, MODEL))(x), parameters(MODEL))[:, 0]
    share = weights / weights.sum()
    centered = rows - share @ rows
    expected = 2 * jnp.einsum("n,ni,nj->ij", share, centered, centered)
    estimator = kfax.SampleSpaceCurvature(centered=True)
    state = updated(estimator, loss_fn, MODEL, (x, y))
    assert_close(eqx.filter_jit(estimator.to_dense)(state, parameters(MODEL)), expected)
    refreshed, v = estimator.refresh(state, parameters(MODEL), 0.1), random(5, 33)
    solved = flat(estimator.solve(refreshed, unlike(MODEL, v)))
    assert_close(solved, jnp.linalg.solve(expected + 0.1 * jnp.eye(33), v))


@pytest.mark.parametrize("max_numbers", [2**24, 100])
def test_examples_that_see_each_other(max_numbers):
    x, y = random(1, 6, 2), random(2, 6, 1)

    def outputs(model):
        f = jax.vmap(model)(x)
        return f - jnp.mean(f, axis=0)

    estimator = kfax.SampleSpaceCurvature(max_numbers=max_numbers)
    state = updated(estimator, lambda m, b: kfax.squared_error(outputs(m), b), MODEL, y)
    rest = eqx.filter(MODEL, eqx.is_inexact_array, inverse=True)
    expected = ggn(lambda p: outputs(eqx.combine(p, rest)), parameters(MODEL), squared_loss, y)
    refreshed, v = estimator.refresh(state, parameters(MODEL), 0.1), random(5, 33)
    solved = flat(estimator.solve(refreshed, unlike(MODEL, v)))
    assert_close(solved, jnp.linalg.solve(expected + 0.1 * jnp.eye(33), v))


PEAK = """
import resource, sys
import equinox as eqx, jax, jax.numpy as jnp
import kfax

model = eqx.nn.MLP(50, "scalar", 500, 2, jnp.tanh, key=jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (240, 50))
estimator = kfax.SampleSpaceCurvature(max_numbers=2**24)
update = lambda x: estimator.update(estimator.init(model), loss_fn, model, x).batch.kernel
loss_fn = lambda model, x: kfax.squared_error(jax.vmap(model)(x), x[:, 0])
program = jax.jit(update).lower(x).compile()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jax.block_until_ready(program(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts in kilobytes")
def test_the_peak_of_memory_is_that_of_the_parts():
    """Of 64 MB for two parts, as much again for the passes, and half for what else there is; R would have 253 MB."""
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2.5 * 4 * 2**24 / 1024


# -- in the optimizer --


def optimizer(**settings):
    preconditioner = kfax.Preconditioner(kfax.SampleSpaceCurvature(), inverse_update_period=1)
    defaults = {"learning_rate": as_it_is(0.3), "momentum": 0.0, "damping": 0.1, "preconditioner": preconditioner}
    return kfax.Optimizer(squared, **(defaults | settings))


@grid(l2=[None, 0.01])
def test_steps_with_projected_momentum_are_those_of_spring(l2):
    """Each update minimizes ½‖Rφ - ρ‖² + λ/2 ‖φ - μ φ_prev‖², with L2 as more rows."""
    model, damping, momentum, rate = MODEL, 0.1, 0.9, 0.3
    optim = optimizer(momentum=kfax.ProjectedMomentum(momentum), l2=l2)
    batches = [(random(i, 6, 2), random(10 + i, 6, 1)) for i in range(3)]
    state, step = optim.init(model, batches[0]), eqx.filter_jit(optim.step)
    previous = np.zeros(33)
    for x, y in batches:
        before = np.asarray(flat(parameters(model)))
        f = lambda p, x=x, m=model: jax.vmap(eqx.combine(p, m))(x)  # noqa: E731
        rows = np.sqrt(2 / 6) * np.asarray(jacobians(f, parameters(model))[:, 0])
        target = np.sqrt(2 / 6) * np.asarray(jax.vmap(model)(x) - y)[:, 0]
        eta = l2 or 0.0
        system = np.vstack([rows, np.sqrt(eta) * np.eye(33), np.sqrt(damping) * np.eye(33)])
        right = np.concatenate([target, np.sqrt(eta) * before, np.sqrt(damping) * momentum * previous])
        previous = np.linalg.lstsq(system, right, rcond=None)[0]
        model, state, info = step(model, state, (x, y))
        assert info.result == kfax.StepResult.successful
        assert_close(flat(parameters(model)), jnp.asarray(before - rate * previous))


def test_a_batch_that_is_not_finite_changes_nothing():
    x, y = random(1, 6, 2), random(2, 6, 1)
    optim = optimizer()
    step = eqx.filter_jit(optim.step)
    model, state, _ = step(MODEL, optim.init(MODEL, (x, y)), (x, y))
    same, state, info = step(model, state, (x.at[0, 0].set(jnp.nan), y))
    assert info.result == kfax.StepResult.non_finite_batch
    assert_close(flat(parameters(same)), flat(parameters(model)))
    _, _, info = step(same, state, (x, y))
    assert info.result == kfax.StepResult.successful


def test_what_cannot_be_had():
    estimator, batch = kfax.SampleSpaceCurvature(), (random(1, 6, 2), random(2, 6, 1))
    empty = estimator.init(MODEL)
    p = parameters(MODEL)
    with pytest.raises(ValueError, match="No batch was seen yet"):
        estimator.multiply(empty, p)
    assert not jnp.any(flat(estimator.solve(empty, p)))
    state = updated(estimator, squared, MODEL, batch)
    for refused in (estimator.decompose, estimator.diagonal):
        with pytest.raises(ValueError, match="Use `kfax.ExplicitExactCurvature`"):
            refused(state, p)
    with pytest.raises(ValueError, match="one damping for all parameters"):
        estimator.refresh(state, p, {"": 0.1})
    with pytest.raises(ValueError, match="inverse_update_period=1"):
        kfax.Preconditioner(estimator)
    with pytest.raises(ValueError, match="must be 1"):
        kfax.Preconditioner(estimator, inverse_update_period=1, curvature_update_period=2)
    with pytest.raises(ValueError, match="`kfax.SampleSpaceCurvature` needs its batch whole"):
        optimizer(micro_batches=2)
    with pytest.raises(ValueError, match="which `kfax.SampleSpaceCurvature` has not"):
        optimizer(damping=kfax.RelativeDamping(0.1))
    with pytest.raises(ValueError, match="`max_numbers` must be a whole number"):
        kfax.SampleSpaceCurvature(max_numbers=0)
    power = kfax.Preconditioner(kfax.ExplicitExactCurvature(), exponent=-0.5)
    with pytest.raises(ValueError, match="needs an inverse"):
        optimizer(momentum=kfax.ProjectedMomentum(0.9), preconditioner=power)
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\]"):
        kfax.ProjectedMomentum(1.5)
    two = lambda m, b: [squared(m, b), squared(m, b)]  # noqa: E731
    with pytest.raises(ValueError, match="return a single one"):
        updated(kfax.SampleSpaceCurvature(centered=True), two, MODEL, batch)

"""Losses with derivatives of the model by its inputs, by forward mode: each tangent is one more use of a layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from derivative_cases import CASES, small_mlp
from helpers import assert_close, flat, parameters
from reference import ggn, squared_loss

import kfax


def dense(case, model):
    """The generalized Gauss-Newton matrix, by `jax.jacrev` of the residuals."""
    rest = eqx.filter(model, eqx.is_inexact_array, inverse=True)
    function = lambda p: case.outputs(eqx.combine(p, rest), case.x)  # noqa: E731
    residuals = function(parameters(model))
    return ggn(function, parameters(model), squared_loss, jnp.zeros_like(residuals))


def blocks(model):
    """For each number of the raveled parameters, which block it belongs to: one for each layer of a stack."""
    matrices, number = kfax.to_matrices(kfax.parameters_of(model)), 0
    for key, matrix in matrices.items():
        layers = len(matrix) if key == STACK and matrix.ndim == 3 else 1
        belongs = number + jnp.arange(layers, dtype=float).reshape(-1, *(1,) * (matrix.ndim - 1))
        matrices[key], number = jnp.broadcast_to(belongs, matrix.shape), number + layers
    return flat(kfax.from_matrices(kfax.parameters_of(model), matrices))


STACK = ".layers[1]"  # of the scanned MLP


@pytest.mark.parametrize(
    ("case", "name"), [*((case, None) for case in CASES), ("mlp-mixed", "batch"), ("tied", "batch")]
)
def test_blocks_of_gradients_are_exact(case, name):
    case = CASES[case]
    model = case.model(kfax.Full())
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis=name)
    loss_fn = case.loss_of(name)
    state = eqx.filter_jit(estimator.update)(estimator.init(model), loss_fn, model, case.x)
    expected, own = dense(case, model), blocks(model)
    assert_close(estimator.to_dense(state, kfax.parameters_of(model)), jnp.where(own[:, None] == own, expected, 0))
    kfax.check(loss_fn, model, case.x, example_axis=name)


def test_diagonal_blocks_are_exact():
    case = CASES["scanned"]
    model = case.model(kfax.Diagonal())
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = eqx.filter_jit(estimator.update)(estimator.init(model), case.loss_of(), model, case.x)
    found = flat(estimator.diagonal(state, kfax.parameters_of(model)))
    assert_close(found, jnp.diagonal(dense(case, model)))


def test_the_optimizer_and_the_exact_estimators():
    """Products with the Jacobian, through derivatives: the quadratic model along the step, and the whole matrix."""
    case = CASES["mlp"]
    model, loss_fn = case.model(), case.loss_of()
    exact = kfax.ExplicitExactCurvature()
    state = exact.update(exact.init(model), loss_fn, model, case.x)
    assert_close(exact.to_dense(state, kfax.parameters_of(model)), dense(case, model))
    optimizer = kfax.full_batch(loss_fn)
    step, opt_state, losses = eqx.filter_jit(optimizer.step), optimizer.init(model, case.x), []
    for i in range(15):
        model, opt_state, info = step(model, opt_state, case.x, key=jax.random.key(i))
        losses.append(float(info.loss))
    assert losses[-1] < losses[0] / 10


def test_derivatives_that_cannot_be_observed():
    model, x = kfax.tag(small_mlp(jax.random.key(0))), CASES["mlp"].x
    estimator = kfax.BlockDiagonalCurvature()
    start = estimator.init(model)

    def loss_of(derivative):
        return lambda model, x: kfax.squared_error(y := jax.vmap(lambda z: derivative(model, z))(x), jnp.zeros_like(y))

    def by_linearize(model, z):
        return jax.linearize(model, z)[1](z)

    others = [
        by_linearize,
        lambda model, z: jax.grad(lambda z: jnp.sum(model(z)))(z),
        lambda model, z: jax.hessian(model)(z),
    ]
    for derivative in others:
        with pytest.raises(ValueError, match=r"differentiates the layer at `.layers.*jax.jacfwd"):
            kfax.check(loss_of(lambda model, z, d=derivative: d(model, z).reshape(-1)), model, x)
        with pytest.raises(eqx.EquinoxRuntimeError, match=r"differentiates the layer at `.layers.*jax.jacfwd"):
            update = eqx.filter_jit(
                lambda model, x, d=derivative: estimator.update(start, loss_of(d), model, x, key=jax.random.key(0))
            )
            jax.block_until_ready(jax.tree.leaves(update(model, x)))
    whole = eqx.tree_at(
        lambda m: m.layers[0],
        small_mlp(jax.random.key(0)),
        kfax.TaggedModule(eqx.nn.Linear(2, 4, key=jax.random.key(1)), block=kfax.Full()),
    )
    with pytest.raises(ValueError, match=r"`\.layers\[0\]`.*by its parameters only: tag the layers within"):
        kfax.check(loss_of(lambda model, z: jax.jacfwd(model)(z).ravel()), kfax.tag(whole), x)

    # By a parameter, in place of an input: right along a fixed direction, but not along one that is of the parameters.
    def by_weight(along):
        def derivative(model, z):
            weights, rest = eqx.partition(model, eqx.is_inexact_array)
            change = jax.tree.map(along, weights)
            return jax.jvp(lambda weights: eqx.combine(weights, rest)(z) ** 2, (weights,), (change,))[1]

        return derivative

    kfax.check(loss_of(by_weight(jnp.ones_like)), model, x)
    with pytest.raises(ValueError, match="is off by"):
        kfax.check(loss_of(by_weight(jnp.sin)), model, x)

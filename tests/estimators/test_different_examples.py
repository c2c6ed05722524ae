"""Losses of different numbers of examples: gradient, quadratic model, exact matrices and blocks are of their sum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import grid
from helpers import assert_close, flat, layer_groups, mlp, parameters, random
from reference import block_diagonal, ggn, kronecker, softmax_loss, squared_loss

import kfax
from kfax._estimators import explicit_exact


MODEL = mlp(jax.random.key(3), (2, 4, 3))
PATHS = [f".layers[{i}]" for i in range(len(MODEL.layers)) if hasattr(MODEL.layers[i], "weight")]
INNER, OUTER, LABELLED = random(1, 7, 2), random(2, 4, 2), random(4, 5, 2)
VALUES, LABELS = random(3, 4, 3), jnp.array([0, 2, 1, 1, 0])
WEIGHTS = jnp.array([1.0, 0.0, 2.5, 1.0])
BATCH = (INNER, (OUTER, VALUES, WEIGHTS), (LABELLED, LABELS))


def slopes(model, x, name=None):
    return jax.vmap(lambda z: jax.jvp(model, (z,), (jnp.ones(2),))[1][:2], axis_name=name)(x)


def outputs(model, x, name=None):
    return jax.vmap(model, axis_name=name)(x)


def loss_of(name=None):
    """A residual of two numbers, boundary values of three with weights, and a classification."""

    def loss_fn(model, batch):
        inner, (outer, values, weights), (labelled, labels) = batch
        r = slopes(model, inner, name)
        return {
            "inner": kfax.squared_error(r, jnp.zeros_like(r)),
            "outer": 5.0 * kfax.squared_error(outputs(model, outer, name), values, weights=weights),
            "classes": kfax.softmax_cross_entropy(outputs(model, labelled, name), labels),
        }

    return loss_fn


def truth():
    """The sum of three matrices, each a mean over examples of its own."""
    p, rest = eqx.partition(kfax.untag(MODEL), eqx.is_inexact_array)
    m = lambda p: eqx.combine(p, rest)  # noqa: E731
    return (
        ggn(lambda p: slopes(m(p), INNER), p, squared_loss, jnp.zeros((7, 2)))
        + 5.0 * ggn(lambda p: outputs(m(p), OUTER), p, squared_loss, VALUES, WEIGHTS)
        + ggn(lambda p: outputs(m(p), LABELLED), p, softmax_loss, LABELS)
    )


def value(p, batch=BATCH):
    """The objective, and by it the gradient, without kfax's losses."""
    model = eqx.combine(p, eqx.filter(kfax.untag(MODEL), eqx.is_inexact_array, inverse=True))
    inner, (outer, values, weights), (labelled, labels) = batch
    squares = jnp.sum((outputs(model, outer) - values) ** 2, axis=1)
    classes = jax.vmap(softmax_loss)(outputs(model, labelled), labels)
    return (
        jnp.mean(jnp.sum(slopes(model, inner) ** 2, axis=1))
        + 5.0 * jnp.sum(weights * squares) / jnp.sum(weights)
        + jnp.mean(classes)
    )


@grid(thin=2, block=[kfax.Full(), kfax.Diagonal()], name=["points", None])
def test_blocks_of_gradients_are_those_of_the_sum(block, name):
    model = kfax.tag(MODEL, block=block)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis=name)
    kfax.check(loss_of(name), model, BATCH, example_axis=name)
    state = eqx.filter_jit(estimator.update)(estimator.init(model), loss_of(name), model, BATCH)
    groups = layer_groups(model, PATHS)
    found = estimator.to_dense(state, parameters(model))
    expected = block_diagonal(truth(), groups)
    assert_close(found, expected if block == kfax.Full() else jnp.diag(jnp.diagonal(expected)))


def test_exact_matrices_in_both_ways(monkeypatch):
    model = kfax.tag(MODEL)
    explicit, implicit = kfax.ExplicitExactCurvature(), kfax.ImplicitExactCurvature()
    with monkeypatch.context() as patch:  # so that it is made of gradients of examples
        patch.setattr(explicit_exact, "dense", lambda _, like: jnp.full((flat(like).size,) * 2, jnp.nan))
        state = eqx.filter_jit(explicit.update)(explicit.init(model), loss_of(), model, BATCH)
        assert_close(explicit.to_dense(state, parameters(model)), truth(), 1e-12)
    state = implicit.update(implicit.init(model), loss_of(), model, BATCH)
    assert_close(implicit.to_dense(state, parameters(model)), truth())


def test_sample_space_has_as_many_rows_as_the_widest_example():
    model, estimator = kfax.tag(MODEL), kfax.SampleSpaceCurvature()
    state = eqx.filter_jit(estimator.update)(estimator.init(model), loss_of(), model, BATCH)
    assert state.batch.kernel.shape == (16 * 3, 16 * 3)
    state = estimator.refresh(state, parameters(model), 0.1)
    gradient = eqx.filter_grad(value)(parameters(kfax.untag(MODEL)))
    damped = truth() + 0.1 * jnp.eye(len(truth()))
    vector = jax.tree.unflatten(jax.tree.structure(parameters(model)), jax.tree.leaves(gradient))
    assert_close(flat(estimator.solve(state, vector)), jnp.linalg.solve(damped, flat(gradient)), 1e-8)


def test_random_sources_are_right_on_average():
    model = kfax.tag(MODEL, block=kfax.Full())
    for source in (kfax.CurvaturePropagation(1000), kfax.SampledFisher(1000)):
        estimator = kfax.BlockDiagonalCurvature(source, example_axis="points")
        update = eqx.filter_jit(lambda m, b, e=estimator: e.update(e.init(m), loss_of("points"), m, b, key=KEY))
        found = estimator.to_dense(update(model, BATCH), parameters(model))
        expected = block_diagonal(truth(), layer_groups(model, PATHS))
        # Of 4000 draws the relative error is about 1 / sqrt(1000).
        assert jnp.linalg.norm(found - expected) < 0.1 * jnp.linalg.norm(expected)


KEY = jax.random.key(5)


def test_kronecker_factors_are_means_over_losses():
    """A of the inputs, each loss's examples counting 1/3 in all; G the sum of what the losses have."""
    model = kfax.tag(MODEL)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="points")

    def loss_fn(model, batch):
        left, right = batch
        y, z = outputs(model, left, "points"), outputs(model, right, "points")
        return [kfax.squared_error(y, jnp.zeros_like(y)), 3 * kfax.squared_error(z, jnp.zeros_like(z))]

    state = eqx.filter_jit(estimator.update)(estimator.init(model), loss_fn, model, (INNER, OUTER))

    def ones(x):
        return jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)

    first, last = MODEL.layers[0], MODEL.layers[-1]
    a, g = 0, 0
    for x, scale in ((INNER, 1), (OUTER, 3)):
        h = ones(jnp.tanh(x @ first.weight.T + first.bias))
        a += h.T @ h / len(h) / 2
        g += 2 * scale * jnp.eye(3)
    [*_, block] = estimator.blocks(state, parameters(model)).values()
    assert last.weight.shape == (3, 4)
    assert_close(block.to_dense(), kronecker(a, g))


def test_steps_go_down_by_the_quadratic_model_of_the_sum():
    model, losses = kfax.tag(MODEL), []
    optimizer = kfax.full_batch(loss_of("points"), estimator=kfax.BlockDiagonalCurvature(example_axis="points"))
    step, state = eqx.filter_jit(optimizer.step), optimizer.init(model, BATCH)
    for i in range(12):
        before = model
        model, state, info = step(model, state, BATCH, key=jax.random.key(i))
        losses.append(float(info.loss))
        if i == 0:
            assert_close(info.loss, value(parameters(kfax.untag(before))))
    assert losses[-1] < losses[0] / 3
    assert np.all(np.diff(losses) < 0)


def test_a_loss_of_some_of_the_examples_that_others_see():
    def loss_fn(model, batch):
        y = outputs(model, batch)
        return [kfax.squared_error(y, jnp.zeros_like(y)), kfax.squared_error(y[:3], jnp.ones((3, 3)))]

    with pytest.raises(ValueError, match=r"losses are of 7 and 3 examples.*for each loss apart.*`weights` or `mask`"):
        kfax.check(loss_fn, kfax.tag(MODEL), INNER)
    # Products with the exact matrix are right also here.
    explicit = kfax.ExplicitExactCurvature()
    state = eqx.filter_jit(explicit.update)(explicit.init(MODEL), loss_fn, MODEL, INNER)
    p, rest = eqx.partition(MODEL, eqx.is_inexact_array)
    run = lambda n: lambda p: outputs(eqx.combine(p, rest), INNER[:n])  # noqa: E731
    expected = sum(ggn(run(n), p, squared_loss, jnp.zeros((n, 3))) for n in (7, 3))
    assert_close(explicit.to_dense(state, parameters(MODEL)), expected)

"""Kronecker factors against explicit rows, and what losses, their multiples and masks make of them."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from block_cases import dense, estimate, members, node, update
from cases import grid, LOSSES, make_case, MODELS
from helpers import assert_close, parameters
from reference import explicit_rows, jacobians, kronecker

import kfax


# -- the factors in general --


@grid(thin=4, model=MODELS, sharing=["Expand", "Reduce"], axis=[None, "batch"])
def test_factors_equal_explicit_rows(model, sharing, axis):
    """A, G and R of every layer, one example, one output and one use at a time."""
    use_bias = axis is None
    case = make_case(model, "softmax", use_bias, num_examples=3, sharing=getattr(kfax, sharing)())
    _, state = estimate(case, example_axis=axis)
    factors = state.average.value
    plain = kfax.untag(case.model)
    outputs = jax.vmap(plain)(case.x)
    hessians = [jax.hessian(lambda f, y=y: case.one(f, y))(f) for f, y in zip(outputs, case.y, strict=True)]
    for path in factors:
        for index in members(case.model, path):
            expected = _explicit_factors(plain, path, index, case.x, hessians, use_bias, sharing)
            found = jax.tree.map(lambda leaf, i=index: leaf if i is None else leaf[i], factors[path])
            assert_close((found.a, found.g, found.positions), expected)


class _Spy(eqx.Module):
    """Stands in for a dense layer; every use goes through `call`."""

    call: Callable
    layer: eqx.nn.Linear

    def __call__(self, x, *, key=None):
        return self.call(x)

    def __getattr__(self, name):
        return getattr(self.layer, name)


def _unrolled(model, path, index, call):
    """The model with the layer at `path` (the `index`-th of a stack) replaced by `call`."""
    if isinstance(model, eqx.nn.MLP):
        first, hidden, last = model.layers
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], hidden) for i in range(2)]
        every = [first, *layers, last]
        position = {".layers[0]": 0, ".layers[1]": 1 + (index or 0), ".layers[2]": 3}[path]

        def run_layers(x):
            for i, layer in enumerate(every):
                x = call(x) if i == position else layer(x)
                x = jnp.tanh(x) if i < 3 else x
            return x

        return run_layers
    if isinstance(model, eqx.nn.Sequential):
        position = int(path[len(".layers[")])

        def run(x):
            for i, layer in enumerate(model.layers):
                x = call(x) if i == position else layer(x)
            return x

        return run
    target = node(model, path)
    spied = eqx.tree_at(lambda m: node(m, path), model, _Spy(call, target), is_leaf=lambda x: x is target)
    if "attention" in path:
        return lambda x: _loop_attention(spied, x)
    return spied


def _loop_attention(model, x):
    """The attention model with a Python loop over positions."""
    x, attention = x.reshape(-1, 4), model.attention
    project = lambda layer, z: jnp.stack([layer(row) for row in z]).reshape(len(z), 2, 2)  # noqa: E731
    q, k, v = (project(getattr(attention, f"{name}_proj"), x) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(2.0), axis=-1)
    mixed = jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(x), 4)
    attended = jnp.stack([attention.output_proj(row) for row in mixed])
    return model.head(jnp.mean(jnp.tanh(attended), axis=0))


def _explicit_factors(model, path, index, inputs, hessians, use_bias, sharing):
    target = node(model, path)
    layer = target if index is None else jax.tree.map(lambda leaf: leaf[index], target)
    a_total, g_total, uses = 0.0, 0.0, 0
    for x, hessian in zip(inputs, hessians, strict=True):
        values, vectors = jnp.linalg.eigh(hessian)
        columns = vectors * jnp.sqrt(jnp.maximum(values, 0))  # another square root than kfax's
        for c, column in enumerate(columns.T):
            a, g = explicit_rows(lambda call, x: _unrolled(model, path, index, call)(x), layer, x, column)
            a = jnp.concatenate([a, jnp.ones((len(a), 1))], axis=1) if use_bias else a
            if sharing == "Reduce":
                a, g = a.mean(0, keepdims=True), g.sum(0, keepdims=True)
            g_total = g_total + g.T @ g
            if c == 0:
                a_total, uses = a_total + a.T @ a, uses + len(a)
    n = len(inputs)
    return a_total / n, g_total / n, jnp.asarray(uses / n)


@grid(sharing=["Expand", "Reduce"])
def test_block_is_kronecker_over_positions(sharing):
    case = make_case("attention", "softmax", sharing=getattr(kfax, sharing)())
    estimator, state = estimate(case)
    path = ".attention.query_proj"
    factors = state.average.value[path]
    assert factors.positions == (2 if sharing == "Expand" else 1)
    expected = kronecker(factors.a, factors.g) / factors.positions
    block = case.model.attention.query_proj.block
    assert_close(block.to_dense(case.model.attention.query_proj.operations()[""].shape(), factors), expected)


# -- several losses, losses with weights, scaled losses --


def test_several_losses_add_up():
    case = make_case("mlp", "softmax")
    targets = jax.random.normal(jax.random.key(9), (6, 3))
    weights = jnp.array([0.0, 1.0, 2.0, 1.0, 0.0, 1.0])

    def both(model, batch):
        outputs = jax.vmap(model)(batch[0])
        return {
            "labels": 0.3 * kfax.softmax_cross_entropy(outputs, batch[1]),
            "targets": kfax.squared_error(outputs, targets, weights=weights),
        }

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = update(estimator, case, loss_fn=both)
    j = jacobians(case.outputs, parameters(case.model))
    p = jax.nn.softmax(case.outputs(parameters(case.model)))
    h = 0.3 * (jax.vmap(jnp.diag)(p) - jnp.einsum("ni,nj->nij", p, p))
    h = h + 2 * jnp.eye(3) * (weights * 6 / weights.sum())[:, None, None]
    # The last layer's G is the mean of H over examples: its rows are the outputs' own cotangents.
    assert_close(state.average.value[".layers[4]"].g, h.mean(0))
    assert j.shape == (6, 3, sum(leaf.size for leaf in jax.tree.leaves(parameters(case.model))))


@grid(thin=2, loss=LOSSES)
def test_a_multiple_of_the_loss_gives_a_multiple_of_the_curvature(loss):
    case = make_case("attention", loss)
    scaled = make_case("attention", loss)
    object.__setattr__(scaled, "loss_fn", lambda model, batch: 5.0 * case.loss_fn(model, batch))
    assert_close(dense(scaled), 5 * dense(case))


@grid(thin=2, model=MODELS, sharing=["Expand", "Reduce"])
def test_masked_examples_do_not_count(model, sharing):
    case = make_case(model, "softmax", sharing=getattr(kfax, sharing)())
    keep = jnp.array([True, False, True, True, False, True])
    masked = make_case(model, "softmax", sharing=getattr(kfax, sharing)(), mask=keep)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    garbage = jnp.where(keep[:, None], case.x, 1e3)
    all_rows = update(estimator, masked, model=case.model, batch=(garbage, case.y))
    kept = update(estimator, case, batch=(case.x[keep], case.y[keep]))
    assert_close(all_rows.average.value, kept.average.value)

"""The block-diagonal estimator against dense curvature matrices from jacobians, in float64."""

import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, LOSSES, make_case, MODELS, UNSHARED
from helpers import assert_close, layer_groups, mlp, parameters
from jax.flatten_util import ravel_pytree
from reference import block_diagonal, explicit_rows, ggn, jacobians, kronecker, signs

import kfax
from kfax._layers import to_matrices


def estimate(case, source=None, key=None, example_axis="batch", frozen=None):
    estimator = kfax.BlockDiagonalCurvature(source or kfax.ExactGGN(), example_axis=example_axis)
    return estimator, update(estimator, case, key=key, frozen=frozen)


def update(estimator, case, state=None, model=None, batch=None, loss_fn=None, **options):
    """One compiled update, of a new state if none is given."""
    model, batch, loss_fn = model or case.model, batch or case.batch, loss_fn or case.loss_fn

    @eqx.filter_jit
    def run(state, model, batch):
        state = estimator.init(model, frozen=options.get("frozen")) if state is None else state
        return estimator.update(state, loss_fn, model, batch, **options)

    return run(state, model, batch)


def dense(case, **options):
    estimator, state = estimate(case, **options)
    return estimator.to_dense(state, parameters(case.model))


def exact_blocks(case, weights=None):
    matrix = ggn(case.outputs, parameters(case.model), case.one, case.y, weights)
    paths = [row.path for row in kfax.coverage(case.model).rows]
    return block_diagonal(matrix, layer_groups(case.model, paths))


class EmpiricalSource(kfax.CotangentSource):
    """The gradients for the given targets, as a user would add them."""

    def num_cotangents(self, losses):
        return 1

    def cotangents(self, losses, index, key):
        [loss] = losses
        gradient = jax.grad(lambda f: eqx.tree_at(lambda m: m.outputs, loss, f).value())(loss.outputs)
        return (gradient * loss.num_examples,)


class AllSigns(kfax.CotangentSource):
    """Curvature propagation with all sign vectors of the outputs, one after the other."""

    def num_cotangents(self, losses):
        return 2 ** losses[0].outputs[0].size

    def cotangents(self, losses, index, key):
        [loss] = losses
        vector = signs(loss.outputs[0].size)[index].reshape(loss.outputs.shape[1:])
        cotangent = loss.weigh(loss.ggn_factor(jnp.broadcast_to(vector, loss.outputs.shape)))
        return (cotangent / jnp.sqrt(self.num_cotangents(losses)),)


class AllLabels(kfax.CotangentSource):
    """The Fisher information with every label, weighted by its probability."""

    def num_cotangents(self, losses):
        return losses[0].outputs.shape[-1]

    def cotangents(self, losses, index, key):
        [loss] = losses
        p = jax.nn.softmax(loss.outputs)
        one_hot = jax.nn.one_hot(index, p.shape[-1])
        return (jnp.sqrt(p[..., index])[..., None] * (p - one_hot),)


# -- exact case 1: one datum --


@grid(thin=3, model=UNSHARED, loss=LOSSES, use_bias=[True, False])
def test_one_example_is_exact(model, loss, use_bias):
    case = make_case(model, loss, use_bias, num_examples=1)
    if model == "mlp-scan":  # the stacked hidden layers are several blocks at one path
        groups = _scanned_groups(case.model)
        matrix = ggn(case.outputs, parameters(case.model), case.one, case.y)
        assert_close(dense(case), block_diagonal(matrix, groups))
    else:
        assert_close(dense(case), exact_blocks(case))


@grid(loss=LOSSES)
def test_copies_of_one_example_are_exact(loss):
    case = make_case("mlp", loss, num_examples=1)
    copies = make_case("mlp", loss, num_examples=1)
    repeated = (jnp.repeat(copies.x, 4, axis=0), jnp.repeat(copies.y, 4, axis=0))
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = update(estimator, case, batch=repeated)
    assert_close(estimator.to_dense(state, parameters(case.model)), exact_blocks(case))


@grid(loss=LOSSES)
def test_empirical_fisher_of_one_example_is_exact(loss):
    case = make_case("mlp", loss, num_examples=1)
    flat, unravel = ravel_pytree(parameters(case.model))
    gradient = jax.grad(lambda v: case.one(case.outputs(unravel(v))[0], case.y[0]))(flat)
    paths = [row.path for row in kfax.coverage(case.model).rows]
    expected = block_diagonal(jnp.outer(gradient, gradient), layer_groups(case.model, paths))
    assert_close(dense(case, source=EmpiricalSource()), expected)


def _scanned_groups(model):
    """Which layer each number belongs to, where `.layers[1]` holds stacked layers."""
    groups = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters(model)):
        index = int(jax.tree_util.keystr(path)[len(".layers[")])
        stacked = 10 + jnp.repeat(jnp.arange(leaf.shape[0]), leaf[0].size)
        groups.append(stacked if index == 1 else jnp.full(leaf.size, index))
    return jnp.concatenate(groups)


# -- exact case 2: deep linear networks with squared error --


def linear_case(use_bias=True, **options):
    network = mlp(jax.random.key(3), (8, 5, 4, 3), activation=None, use_bias=use_bias)
    return make_case(network, "squared", **options)


@grid(use_bias=[True, False], num_examples=[1, 5])
def test_deep_linear_networks_are_exact(use_bias, num_examples):
    case = linear_case(use_bias, num_examples=num_examples)
    assert_close(dense(case), exact_blocks(case))


def test_deep_linear_networks_are_exact_with_weights():
    weights = jnp.array([1.0, 3.0, 0.0, 0.5])
    case = linear_case(num_examples=4, weights=weights)
    # G does not depend on the example here, so the weighted A makes the block exact.
    assert_close(dense(case), exact_blocks(case, weights))


def test_the_empirical_fisher_is_another_matrix():
    case = linear_case(num_examples=5)
    exact = exact_blocks(case)
    gap = jnp.linalg.norm(dense(case, source=EmpiricalSource()) - exact) / jnp.linalg.norm(exact)
    assert gap > 0.3


@grid(frozen=["weight", "bias", "layer"])
def test_frozen_parameters_leave_the_other_blocks_exact(frozen):
    case = linear_case(num_examples=5)

    def where(model):
        layer = model.layers[1]
        return layer if frozen == "layer" else getattr(layer, frozen)

    estimator, state = estimate(case, frozen=where)
    excluded = {id(leaf) for leaf in jax.tree.leaves(where(case.model))}
    kept = eqx.filter(case.model, jax.tree.map(lambda x: eqx.is_array(x) and id(x) not in excluded, case.model))
    rest = eqx.filter(case.model, jax.tree.map(lambda x: id(x) in excluded, case.model))
    matrix = ggn(lambda p: case.outputs(eqx.combine(p, rest)), kept, case.one, case.y)
    # With one of its two parameters frozen the middle layer is still one block.
    paths = [f".layers[{i}]" for i in range(3)]
    assert_close(estimator.to_dense(state, kept), block_diagonal(matrix, layer_groups(kept, paths)))


@pytest.mark.parametrize("source", [kfax.SampledFisher(3000), kfax.CurvaturePropagation(3000)])
def test_sampled_sources_converge(source):
    case = linear_case(num_examples=5)
    exact = exact_blocks(case)
    gap = jnp.linalg.norm(dense(case, source=source, key=jax.random.key(5)) - exact) / jnp.linalg.norm(exact)
    assert gap < 0.1  # the error of a mean of 3000 x 5 draws is a few percent


# -- exact case 8: outputs with more axes --


class Pointwise(eqx.Module):
    network: eqx.nn.Sequential

    def __call__(self, x):
        return jax.vmap(self.network)(x)


@grid(thin=2, loss=LOSSES, average=[False, True])
def test_outputs_of_more_axes_equal_the_flattened_batch(loss, average):
    n, t = 4, 3
    row = LOSSES[loss]
    model = kfax.tag(mlp(jax.random.key(3), (8, 5, 3)))
    x = jax.random.normal(jax.random.key(4), (n, t, 8))
    y = row.targets(jax.random.key(5), (n, t, 3))

    def sequences(model, batch):
        outputs = jax.vmap(jax.vmap(model))(batch[0])
        return row.make(outputs, batch[1], mean_over_positions=average)

    def flattened(model, batch):
        return row.make(jax.vmap(model)(batch[0]), batch[1])

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = update(estimator, None, model=model, batch=(x, y), loss_fn=sequences)
    flat_batch = (x.reshape(n * t, 8), y.reshape(n * t, *y.shape[2:]))
    flat = update(estimator, None, model=model, batch=flat_batch, loss_fn=flattened)
    # Losses of the positions of one example are summed: t times the mean over positions.
    scale = 1.0 if average else float(t)
    assert_close(estimator.to_dense(state, parameters(model)), scale * estimator.to_dense(flat, parameters(model)))


# -- exact case 12: enumeration --


@grid(thin=2, loss=LOSSES, model=["mlp", "attention"])
def test_all_signs_give_the_exact_ggn(loss, model):
    case = make_case(model, loss)
    assert_close(dense(case, source=AllSigns()), dense(case))


@grid(model=["mlp", "attention"])
def test_all_labels_give_the_exact_ggn(model):
    case = make_case(model, "softmax")
    assert_close(dense(case, source=AllLabels()), dense(case))


@pytest.mark.parametrize("source", [kfax.SampledFisher(), kfax.CurvaturePropagation()], ids=["sampled", "signs"])
@grid(thin=2, loss=LOSSES)
def test_sources_are_unbiased(loss, source):
    case = make_case("mlp", loss, num_examples=2)
    exact = dense(case)
    draw = eqx.filter_jit(lambda key: dense(case, source=source, key=key))
    draws = jax.lax.map(draw, jax.random.split(jax.random.key(1), 3000), batch_size=100)
    errors = draws.std(0) / jnp.sqrt(len(draws))
    # Five standard errors for each of some thousand entries; entries that never vary must agree.
    assert jnp.all(jnp.abs(draws.mean(0) - exact) <= 5 * errors + 1e-10 * jnp.abs(exact).max())


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
        for index in _members(case.model, path):
            expected = _explicit_factors(plain, path, index, case.x, hessians, use_bias, sharing)
            found = jax.tree.map(lambda leaf, i=index: leaf if i is None else leaf[i], factors[path])
            assert_close((found.a, found.g, found.positions), expected)


def _node(model, path):
    return eval("m" + path, {"m": model})


def _members(model, path):
    stack = _node(model, path).weight.shape[:-2]
    return range(stack[0]) if stack else [None]


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
    target = _node(model, path)
    spied = eqx.tree_at(lambda m: _node(m, path), model, _Spy(call, target), is_leaf=lambda x: x is target)
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
    target = _node(model, path)
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


# -- solve, multiply, refresh --


@grid(thin=2, model=MODELS)
def test_solve_inverts_the_damped_factors(model):
    case = make_case(model, "softmax")
    estimator, state = estimate(case)
    p = parameters(case.model)
    refreshed = estimator.refresh(state, p, jnp.asarray(0.1))
    vector = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), p)
    solved = estimator.solve(refreshed, vector)
    for path, factors in state.average.value.items():
        for index in _members(case.model, path):
            pick = lambda leaf, i=index: leaf if i is None else leaf[i]  # noqa: E731
            a, g = pick(factors.a), pick(factors.g) / pick(factors.positions)
            pi = jnp.sqrt((jnp.trace(a) / len(a)) / (jnp.trace(g) / len(g)))
            damped = kronecker(a + pi * jnp.sqrt(0.1) * jnp.eye(len(a)), g + jnp.sqrt(0.1) / pi * jnp.eye(len(g)))
            before, after = (pick(to_matrices(tree)[path]) for tree in (vector, solved))
            # The condition number of the damped block, some hundreds, multiplies the rounding of its inverse.
            assert_close(damped @ after.reshape(-1), before.reshape(-1), tolerance=1e-9)
    # Neither statistics nor an estimate that was not refreshed change.
    assert eqx.tree_equal(refreshed.average, state.average)
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(estimator.solve(state, vector)))


@grid(thin=2, model=MODELS)
def test_multiply_and_eigenvalues_are_those_of_the_dense_matrix(model):
    case = make_case(model, "softmax")
    estimator, state = estimate(case)
    p = parameters(case.model)
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size) + 1.0).reshape(x.shape), p))
    matrix = estimator.to_dense(state, p)
    assert_close(ravel_pytree(estimator.multiply(state, unravel(flat)))[0], matrix @ flat)
    eigenvalues = estimator.eigenvalues(state, p)
    # Many eigenvalues are near zero, and are known only to the rounding of the dense eigensolver.
    assert_close(jnp.sort(eigenvalues), jnp.linalg.eigvalsh(matrix), tolerance=1e-9)


def test_statistics_are_averaged_over_updates():
    case = make_case("mlp", "softmax")
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)
    state, singles = estimator.init(case.model), []
    for i in range(3):
        batch = (case.x + i, case.y)
        state = update(estimator, case, state, batch=batch)
        singles.append(update(estimator, case, batch=batch).average.value)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *singles)
    assert_close(state.average.value, mean)


def test_batch_size_may_change():
    case = make_case("attention", "softmax", sharing=kfax.Reduce())
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = estimator.init(case.model)
    for size in (6, 2, 5):
        new = update(estimator, case, state, batch=(case.x[:size], case.y[:size]))
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        state = new


@grid(thin=2, model=["attention", "mlp-scan"], sharing=["Expand", "Reduce"])
def test_jit_scan_and_checkpoint_change_nothing(model, sharing):
    case = make_case(model, "softmax", sharing=getattr(kfax, sharing)())
    _, expected = estimate(case)
    eager = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    state = eager.update(eager.init(case.model), case.loss_fn, case.model, case.batch)
    assert_close(state.average.value, expected.average.value)

    def rematerialized(model, batch):
        return kfax.softmax_cross_entropy(
            jax.vmap(eqx.filter_checkpoint(lambda x: model(x)), axis_name="batch")(batch[0]), batch[1]
        )

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    again = update(estimator, case, loss_fn=rematerialized)
    assert_close(again.average.value, expected.average.value)


def test_bfloat16_computation_keeps_float32_statistics():
    network = mlp(jax.random.key(3), (8, 5, 3), dtype=jnp.float32)
    model = kfax.tag(network)
    x, y = jax.random.normal(jax.random.key(1), (6, 8), jnp.float32), jnp.arange(6) % 3

    def low(model, batch):
        cast = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if eqx.is_inexact_array(p) else p, model)
        return kfax.softmax_cross_entropy(jax.vmap(cast)(batch[0].astype(jnp.bfloat16)), batch[1])

    def full(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    found, exact = (update(estimator, None, model=model, batch=(x, y), loss_fn=f).average.value for f in (low, full))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    assert_close(found, exact, tolerance=0.05)  # bfloat16 has three digits


def test_no_array_of_one_matrix_for_each_example():
    model = kfax.tag(mlp(jax.random.key(3), (11, 13, 17)))
    x, y = jnp.ones((7, 11)), jnp.zeros(7, int)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    def run(x, y):
        return estimator.update(estimator.init(model), loss_fn, model, (x, y)).average.value

    text = jax.jit(run).lower(x, y).compile().as_text() or ""
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f64\[(\d+(?:,\d+)+)\]", text)]
    assert (14, 14) in shapes and (7, 13) in shapes  # the expression finds what it looks for
    assert not [dims for dims in shapes if 7 in dims and len(dims) >= 3 and min(dims) > 1]


def test_program_size_does_not_grow_with_the_number_of_classes():
    def size(classes):
        model = kfax.tag(mlp(jax.random.key(3), (4, 5, classes)))
        estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())

        def loss_fn(model, batch):
            return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])

        def run(x, y):
            return estimator.update(estimator.init(model), loss_fn, model, (x, y)).average.value

        return jax.jit(run).lower(jnp.ones((3, 4)), jnp.zeros(3, int)).as_text().count("\n")

    assert size(1000) == size(10)


@grid(thin=2, model=MODELS)
def test_gram_of_the_exact_ggn(model):
    case = make_case(model, "softmax")
    p = parameters(case.model)
    vectors = [jax.tree.map(lambda x, s=s: jnp.sin(jnp.arange(x.size) * s + 1).reshape(x.shape), p) for s in (1.0, 2.0)]
    exact = kfax.ImplicitExactCurvature()
    state = exact.update(exact.init(case.model), case.loss_fn, case.model, case.batch)
    gram = eqx.filter_jit(exact.gram)(state, vectors)
    flat = jnp.stack([ravel_pytree(v)[0] for v in vectors])
    matrix = ggn(case.outputs, p, case.one, case.y)
    assert_close(gram, flat @ matrix @ flat.T)


# -- exact cases 3, 4 and 5: weight sharing in deep linear networks with squared error --


class LinearPositions(eqx.Module):
    """A deep linear network at each position; `pool` puts positions together after the layer before the head."""

    layers: list
    head: eqx.nn.Linear
    pool: Callable | None

    def __init__(self, key, pool, use_bias):
        keys = jax.random.split(key, 3)
        self.layers = [eqx.nn.Linear(4, 3, use_bias=use_bias, key=keys[0]), eqx.nn.Linear(3, 3, key=keys[1])]
        self.head = eqx.nn.Linear(3, 2, use_bias=use_bias, key=keys[2])
        self.pool = pool

    def __call__(self, x):
        xs = x.reshape(2, 4)
        for layer in self.layers:
            xs = jax.vmap(layer)(xs)
        return jax.vmap(self.head)(xs) if self.pool is None else self.head(self.pool(xs, axis=0))


def _is_exact(network, sharing):
    case = make_case(network, "squared", num_examples=5, sharing=sharing)
    found, exact = dense(case), exact_blocks(case)
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


@grid(thin=2, use_bias=[True, False])
def test_expand_is_exact_where_positions_have_losses_of_their_own(use_bias):
    network = LinearPositions(jax.random.key(0), None, use_bias)
    assert _is_exact(network, kfax.Expand()) < 1e-10
    assert _is_exact(network, kfax.Reduce()) > 0.01


@grid(thin=2, pool=["sum", "mean"], use_bias=[True, False])
def test_reduce_is_exact_where_positions_are_pooled(pool, use_bias):
    network = LinearPositions(jax.random.key(0), getattr(jnp, pool), use_bias)
    assert _is_exact(network, kfax.Reduce()) < 1e-10
    assert _is_exact(network, kfax.Expand()) > 0.01


class Convolutional(eqx.Module):
    conv: kfax.TaggedConv
    pooled: bool

    def __call__(self, x):
        y = self.conv(x.reshape(2, 4))
        return jnp.mean(y, axis=1) if self.pooled else y.T


@grid(thin=2, use_bias=[True, False], padding=[0, 1])
def test_convolutions_are_exact_in_the_linear_case(use_bias, padding):
    conv = eqx.nn.Conv1d(2, 3, 2, padding=padding, use_bias=use_bias, key=jax.random.key(0))
    for pooled, good, bad in [(False, kfax.Expand(), kfax.Reduce()), (True, kfax.Reduce(), kfax.Expand())]:
        for sharing, exact in [(good, True), (bad, False)]:
            network = kfax.TaggedConv(conv, block=kfax.KroneckerFactored(sharing))
            error = _is_exact(Convolutional(network, pooled), sharing)
            assert error < 1e-10 if exact else error > 0.01

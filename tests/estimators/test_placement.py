"""Inverses computed on several devices: the same as those computed on each."""

import contextlib
import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, parameters
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfax


KEYS = jax.random.split(jax.random.key(0), 6)
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


class Net(eqx.Module):
    """Layers of several sizes, a stack of six, a normalization, a convolution."""

    convolution: eqx.nn.Conv1d
    encoder: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    stack: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        self.convolution = eqx.nn.Conv1d(2, 3, 3, padding=1, key=KEYS[0])
        self.encoder = eqx.nn.Linear(15, 6, key=KEYS[1])
        self.norm = eqx.nn.LayerNorm(6)
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))(jax.random.split(KEYS[2], 6))
        self.head = eqx.nn.Linear(6, 4, use_bias=False, key=KEYS[3])

    def __call__(self, x):
        x = self.norm(jnp.tanh(self.encoder(self.convolution(x).reshape(-1))))
        arrays, rest = eqx.partition(self.stack, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, layer: (x + jnp.tanh(eqx.combine(layer, rest)(x)), None), x, arrays)
        return self.head(x)


def loss_fn(model, batch):
    inputs, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(inputs), labels)


BATCH = jax.random.normal(KEYS[4], (8, 2, 5)), jnp.arange(8) % 4


def on_mesh(tree, mesh, *spec):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(*spec))), rest)


def everywhere(mesh, names="data"):
    return kfax.BlockDiagonalCurvature(placement=kfax.Placement(mesh, names))


def placed(mesh, names="data"):
    return kfax.PlacedCurvature(kfax.BlockDiagonalCurvature(), kfax.Placement(mesh, names))


def refreshed(mesh, estimator, block=None):
    """The inverses of the network's curvature, with its batch on a mesh."""
    model = on_mesh(kfax.tag(Net()) if block is None else kfax.tag(Net(), block=block), mesh)
    update = lambda *args: estimator.update(*args, key=KEYS[5])  # noqa: E731
    state = eqx.filter_jit(update)(estimator.init(model), loss_fn, model, on_mesh(BATCH, mesh, "data"))
    return estimator, eqx.filter_jit(estimator.refresh)(state, parameters(model), 0.1), parameters(model)


BLOCKS = {"own": None, "diagonalized": kfax.KroneckerFactored(inversion=kfax.Eigh()), "full": kfax.Full()}


@pytest.mark.parametrize("block", BLOCKS)
def test_inverses_are_those_of_one_device(block):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    estimator, alone, vector = refreshed(mesh, kfax.BlockDiagonalCurvature(), BLOCKS[block])
    _, shared, _ = refreshed(mesh, everywhere(mesh), BLOCKS[block])
    assert jax.tree.structure(shared) == jax.tree.structure(alone)
    assert_close(estimator.solve(shared, vector), estimator.solve(alone, vector), tolerance=1e-12)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(shared.inverses))


@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_kept_in_parts_is_the_same_curvature(block):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    whole, alone, vector = refreshed(mesh, kfax.BlockDiagonalCurvature(), BLOCKS[block])
    estimator, parts, _ = refreshed(mesh, placed(mesh), BLOCKS[block])
    for rows in (parts.average.value.rows, parts.inverses.rows):
        assert [shard.data.shape[0] for shard in rows.addressable_shards] == [1] * 4
    close = functools.partial(assert_close, tolerance=1e-12)
    for name in ("solve", "multiply", "diagonal", "to_dense"):
        close(getattr(estimator, name)(parts, vector), getattr(whole, name)(alone, vector))
    close(estimator.power(parts, vector, -0.5, 0.1), whole.power(alone, vector, -0.5, 0.1))
    close(jnp.sort(estimator.eigenvalues(parts, vector)), jnp.sort(whole.eigenvalues(alone, vector)))
    close(estimator.as_operator(parts, vector, 0.1).mv(vector), whole.as_operator(alone, vector, 0.1).mv(vector))
    close(estimator.as_preconditioner(parts, vector).mv(vector), whole.solve(alone, vector))
    key = ".stack"
    close(estimator.blocks(parts, vector)[key].to_dense(), whole.blocks(alone, vector)[key].to_dense())
    found = estimator.solve(estimator.redamp(parts, vector, 0.3), vector)
    close(found, whole.solve(whole.redamp(alone, vector, 0.3), vector))


@pytest.mark.parametrize(("block", "kind"), [("own", "explicit"), ("diagonalized", "automatic")])
def test_parts_of_what_was_gathered_are_the_same_bits(block, kind):
    """Also on another number of devices; what is put there is as what a refresh leaves there."""
    mesh, fewer = (jax.make_mesh((n,), ("data",), axis_types=(KINDS[kind],)) for n in (4, 3))
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        estimator, parts, vector = refreshed(mesh, placed(mesh), BLOCKS[block])
        whole = estimator.gathered(parts)
        again = estimator.placed(whole, vector)
    assert bool(eqx.tree_equal(again, parts))
    pairs = zip(jax.tree.leaves(again), jax.tree.leaves(parts), strict=True)
    assert all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)
    with jax.set_mesh(fewer) if kind == "explicit" else contextlib.nullcontext():
        state = placed(fewer).placed(on_mesh(whole, fewer), on_mesh(vector, fewer))
        assert [shard.data.shape[0] for shard in state.inverses.rows.addressable_shards] == [1] * 3
        assert bool(eqx.tree_equal(jax.device_get(placed(fewer).gathered(state)), jax.device_get(whole)))
    with pytest.raises(ValueError, match="A vector has the blocks"):
        estimator.placed(whole, parameters(kfax.tag(Net().head)))


@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize("make", [everywhere, placed])
def test_explicit_axes_outside_of_an_optimizer(make, is_set):
    mesh = jax.make_mesh((4,), ("data",))
    _, alone, expected = refreshed(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)), WHOLE)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        estimator, state, vector = refreshed(mesh, make(mesh))
        found = [estimator.solve(state, vector), estimator.as_operator(state, vector, 0.1).mv(vector)]
    found = jax.tree.map(np.asarray, found)
    assert_close(found[0], jax.tree.map(np.asarray, WHOLE.solve(alone, expected)), tolerance=1e-12)
    assert_close(
        found[1], jax.tree.map(np.asarray, WHOLE.as_operator(alone, expected, 0.1).mv(expected)), tolerance=1e-12
    )


WHOLE = kfax.BlockDiagonalCurvature()


def test_two_batches_and_one_that_is_not_finite():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    model, vector = on_mesh(kfax.tag(Net()), mesh), None
    inputs, labels = BATCH
    results = []
    for estimator in (kfax.BlockDiagonalCurvature(), placed(mesh)):
        turns = kfax.Preconditioner(estimator, inverse_update_period=2)
        optimizer = kfax.Optimizer(
            loss_fn, learning_rate=0.1, momentum=0.5, damping=0.1, preconditioner=turns, micro_batches=2
        )
        state, step = optimizer.init(model, on_mesh(BATCH, mesh, "data")), eqx.filter_jit(optimizer.step)
        trained = model
        for i in range(4):
            batch = (inputs * jnp.nan, labels) if i == 2 else (inputs + i, labels)
            trained, state, info = step(trained, state, on_mesh(batch, mesh, "data"), key=jax.random.key(i))
            assert (info.result == kfax.StepResult.non_finite_batch) == (i == 2)
        vector = parameters(trained)
        results.append((vector, estimator.diagonal(state.curvature, vector)))
    assert_close(results[1], results[0], tolerance=1e-12)


@pytest.mark.parametrize("make", [everywhere, placed])
@pytest.mark.parametrize(("number", "kind"), [(2, "automatic"), (4, "explicit")])
def test_training_is_that_of_one_device(number, kind, make):
    """Also over several axes of a mesh, and with blocks that have their turns."""
    shape, names = ((2,), ("data",)) if number == 2 else ((2, 2), ("data", "more"))
    mesh = jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))

    def run(estimator, put):
        turns = kfax.Preconditioner(estimator, inverse_update_period=kfax.Staggered(2))
        optimizer = kfax.Optimizer(loss_fn, learning_rate=0.3, momentum=0.5, damping=0.1, preconditioner=turns)
        model, batch = put(kfax.tag(Net())), put(BATCH, "data")
        state, losses = optimizer.init(model, batch), []
        step = eqx.filter_jit(optimizer.step)
        for i in range(30):
            model, state, info = step(model, state, batch, key=jax.random.key(i))
            losses.append(float(info.loss))
            arrays = jax.tree.leaves(eqx.filter((model, state), eqx.is_array))
            for leaf in [leaf for leaf in arrays if leaf.sharding.is_fully_replicated]:
                copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
                assert all(np.array_equal(copies[0], copy) for copy in copies)  # to the last bit
        assert losses[-1] < losses[0] / 2
        return [np.asarray(leaf) for leaf in (losses, *jax.tree.leaves(parameters(model)))]

    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        found = run(make(mesh, names), functools.partial(_put, mesh))
    assert_close(found, run(kfax.BlockDiagonalCurvature(), lambda tree, *spec: tree), tolerance=1e-10)


def _put(mesh, tree, *spec):
    return on_mesh(tree, mesh, *spec)


def test_each_device_factorizes_its_share():
    """Counted from the operands of the factorizations in the compiled program; and what is sent."""
    sizes = (6, 9, 6, 9, 6, 9, 6, 9, 6)
    keys = jax.random.split(KEYS[0], len(sizes))
    layers = [eqx.nn.Linear(m, n, use_bias=False, key=k) for m, n, k in zip(sizes[:-1], sizes[1:], keys, strict=False)]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    model = on_mesh(kfax.tag(eqx.nn.Sequential(layers)), mesh)

    def compiled(estimator, method, *arguments):
        state = estimator.init(model)
        state = on_mesh(state, mesh) if isinstance(state, kfax.BlockDiagonalState) else state
        function = jax.jit(lambda state, p: getattr(estimator, method)(state, p, *arguments))
        return function.lower(state, parameters(model)).compile().as_text()

    def factorized(text):
        """The cubes of the sizes of matrices that are decomposed, by the computation that decomposes them."""
        found = []
        for computation in re.split(r"\n(?=%|ENTRY)", text):
            matrices = re.findall(r"f64\[(?:1,)?(\d+),\1\]\S*(?:, \S+)*\) custom-call\(.*lapack_dpotrf", computation)
            found += [sum(int(size) ** 3 for size in matrices)] if matrices else []
        return found

    def sent(text):
        assert not re.search(r" (all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text)
        return [tuple(map(int, each)) for each in re.findall(r"f64\[(\d+),(\d+)\]\S* all-gather\(", text)]

    alone = compiled(kfax.BlockDiagonalCurvature(), "refresh", 0.1)
    everything = 8 * (6**3 + 9**3)
    assert factorized(alone) == [everything] and sent(alone) == []
    shared = compiled(everywhere(mesh), "refresh", 0.1)
    # All inverses are sent, at once.
    assert factorized(shared) == [everything // 4] * 4 and sent(shared) == [(4, 2 * (6**2 + 9**2))]
    parts = compiled(placed(mesh), "refresh", 0.1)
    assert factorized(parts) == [everything // 4] * 4 and sent(parts) == []
    # Only what was multiplied is sent, not what it was multiplied by.
    assert sent(compiled(placed(mesh), "solve")) == [(4, 2 * 6 * 9)]


def test_rows_of_different_lengths_are_summed():
    """One block is most of a network: gathered, it would be sent once for each device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    layers = [eqx.nn.Linear(9, 8, key=KEYS[0]), eqx.nn.Linear(8, 2, use_bias=False, key=KEYS[1])]
    model = on_mesh(kfax.tag(eqx.nn.Sequential(layers)), mesh)
    batch = on_mesh((BATCH[0].reshape(8, -1)[:, :9], BATCH[1] % 2), mesh, "data")
    solutions = []
    estimators: list[Any] = [kfax.BlockDiagonalCurvature(), everywhere(mesh), placed(mesh)]
    for estimator in estimators:

        def run(model, batch, estimator=estimator):
            state = estimator.update(estimator.init(model), loss_fn, model, batch, key=KEYS[5])
            state = estimator.refresh(state, parameters(model), 0.1)
            return state, estimator.solve(state, parameters(model))

        run_jitted: Any = eqx.filter_jit(run)
        compiled = run_jitted.lower(model, batch).compile()
        state, solution = compiled(model, batch)
        solutions.append((solution, estimator.to_dense(state, parameters(model))))
        if isinstance(state, kfax.PlacedState):
            text = compiled.compiled.as_text()
            assert "all-gather(" not in text and re.search(r"f64\[96\].* all-reduce\(", text)
    assert_close(solutions[1:], [solutions[0]] * 2, tolerance=1e-12)
    [*_, row] = kfax.coverage(model, devices=4).devices
    assert row.solution_gathered == 2 * 8 * 96


def test_mistakes():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="or several different ones"):
        kfax.Placement(mesh, ("data", "data"))
    with pytest.raises(ValueError, match="has a placement of its own"):
        kfax.PlacedCurvature(everywhere(mesh), kfax.Placement(mesh))
    model, estimator = on_mesh(kfax.tag(Net()), mesh), placed(mesh)
    state = estimator.init(model, frozen=lambda model: model.head)
    with pytest.raises(ValueError, match="A vector has the blocks"):
        estimator.update(state, loss_fn, model, on_mesh(BATCH, mesh, "data"), key=KEYS[5])
    shard = jax.shard_map(
        lambda p: everywhere(mesh).refresh(everywhere(mesh).init(model), p, 0.1),
        mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"or inside `jax\.shard_map`"):
        shard(parameters(model))


def test_an_axis_that_the_mesh_lacks():
    with pytest.raises(ValueError, match=r"among those of the mesh, \('data',\), got 'model'"):
        kfax.Placement(jax.make_mesh((2,), ("data",)), "model")

"""Meshes with explicit axes, as `jax.make_mesh` makes them: everything is as on one device.

The batch is sharded over four devices, the model replicated; with the mesh set for the whole program, and without.
"""

import contextlib
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from cases import ALL_LOSSES, Attention, grid, make_case
from helpers import assert_close, mlp, parameters
from jax.sharding import NamedSharding, PartitionSpec
from layer_cases import LAYERS

import kfax


N = 8
KEY = jax.random.key(1)
# With `jax.set_mesh` even arrays that are on no mesh are of its types.
CONTEXTS = {"set": jax.set_mesh, "not set": lambda mesh: contextlib.nullcontext()}


# What the tables of cases are run with: either way takes the same path through kfax.
one_context = pytest.mark.parametrize("on_mesh", ["set"], indirect=True)


@pytest.fixture(params=CONTEXTS)
def on_mesh(request):
    """`on_mesh(run, model, batch)`: `run`, with the model replicated and the batch sharded over a default mesh."""
    mesh = jax.make_mesh((4,), ("data",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)

    def put(tree, *spec):
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(*spec))), rest)

    def call(run, model, batch):
        with CONTEXTS[request.param](mesh):
            return run(put(model), put(batch, "data"))

    return call


def on_host(tree):
    """Arrays that are on no mesh, to be compared."""
    read = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(read(x)), eqx.filter(tree, eqx.is_array))


def both(run, on_mesh, model, batch, tolerance=None):
    """`run(model, batch)` on one device and on the mesh."""
    assert_close(on_host(on_mesh(run, model, batch)), on_host(run(model, batch)), tolerance)


def shardings(tree):
    return [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


# -- training --


PRESETS = {
    "full batch": kfax.full_batch,
    "stochastic": functools.partial(kfax.stochastic, learning_rate=0.03),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_training(preset, on_mesh):
    traces = []
    case = make_case("mlp", "softmax", num_examples=16)

    def loss_fn(model, batch):
        traces.append(None)
        return case.loss_fn(model, batch)

    optimizer = PRESETS[preset](loss_fn)

    def run(model, batch):
        state = optimizer.init(model, batch)
        step, history = eqx.filter_jit(lambda *args: optimizer.step(*args, key=KEY)), []
        before, first = shardings((model, state)), None
        for _ in range(12):
            model, state, info = step(model, state, batch)
            history.append((info.loss, info.damping, parameters(model)))
            first = len(traces) if first is None else first
        assert shardings((model, state)) == before
        assert len(traces) == first  # traced once: what `init` made was already like what a step returns
        return history, state

    both(run, on_mesh, case.model, case.batch)

    def is_replicated(tree):
        leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
        return all(leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 4 for leaf in leaves)

    def run_without_jit(model, batch):
        state = optimizer.init(model, batch)
        assert is_replicated(state) and is_replicated(optimizer.step(model, state, batch, key=KEY))

    on_mesh(run_without_jit, case.model, case.batch)


def test_all_that_an_optimizer_does(on_mesh):
    case = make_case("mlp", "softmax", num_examples=16)

    def loss_fn(model, batch, model_state, key):
        noise = 0.1 * jax.random.normal(key, batch[0].shape)
        outputs = jax.vmap(model, axis_name="batch")(batch[0] + noise)
        losses = [kfax.softmax_cross_entropy(outputs, batch[1]), kfax.Penalty(jnp.mean(outputs**2))]
        return losses, model_state + jnp.mean(outputs), {"outputs": outputs}

    optimizer = kfax.Optimizer(
        loss_fn,
        learning_rate=kfax.QuadraticModel(batch=kfax.Fraction(1 / 2)),
        momentum=0.5,
        damping=kfax.LevenbergMarquardt(1.0, period=1),
        l2=1e-2,
        micro_batches=2,
        preconditioner=kfax.Preconditioner(batch=kfax.Fraction(1 / 4)),
        rejection=kfax.Rejection(),
        report_layers=True,
    )

    def run(model, batch):
        options = {"key": KEY, "model_state": jnp.zeros(())}
        state = optimizer.init(model, batch, **options)
        state = eqx.filter_jit(optimizer.burn_in)(model, state, batch, **options)
        state = eqx.filter_jit(optimizer.calibrate)(model, state, batch, **options)
        state = eqx.filter_jit(optimizer.refresh)(model, state)
        return eqx.filter_jit(optimizer.step)(model, state, batch, **options)

    both(run, on_mesh, case.model, case.batch)


def test_a_compiled_loop(on_mesh):
    case = make_case("mlp", "softmax", num_examples=N)
    optimizer = kfax.stochastic(case.loss_fn, learning_rate=0.03)

    def run(model, batch):
        rest = eqx.filter(model, eqx.is_array, inverse=True)

        @jax.jit
        def train(arrays, state, batch, keys):
            def one(carry, key):
                model, state, info = optimizer.step(eqx.combine(carry[0], rest), carry[1], batch, key=key)
                return (eqx.filter(model, eqx.is_array), state), info.loss

            return jax.lax.scan(one, (arrays, state), keys)

        state = optimizer.init(model, batch)
        return train(eqx.filter(model, eqx.is_array), state, batch, jax.random.split(KEY, 5))

    both(run, on_mesh, case.model, case.batch)


def test_an_ensemble_that_is_not_compiled(on_mesh):
    case = make_case("mlp", "softmax", num_examples=N)
    optimizer = kfax.Optimizer(case.loss_fn, learning_rate=0.1, momentum=0.9, damping=1.0)

    def run(model, batch):
        axes, member = optimizer.state_axes(optimizer.init(model, batch)), eqx.if_array(0)
        models = jax.tree.map(lambda x: jnp.stack([x, 2 * x]) if eqx.is_array(x) else x, model)
        states = eqx.filter_vmap(optimizer.init, in_axes=(member, None), out_axes=axes)(models, batch)
        step = functools.partial(optimizer.step, key=KEY)
        step = eqx.filter_vmap(step, in_axes=(member, axes, None), out_axes=(member, axes, member))
        return step(models, states, batch)

    both(run, on_mesh, case.model, case.batch)


def test_a_link_of_optax(on_mesh):
    case = make_case("mlp", "softmax", num_examples=N)
    optim = optax.chain(kfax.scale_by_curvature(case.loss_fn, damping=0.1), optax.sgd(0.1, momentum=0.9))

    @eqx.filter_jit
    def step(model, state, batch):
        gradients = eqx.filter_grad(lambda m: case.loss_fn(m, batch).value())(model)
        updates, state = optim.update(gradients, state, parameters(model), model=model, batch=batch, key=KEY)
        return eqx.apply_updates(model, updates), state

    def run(model, batch):
        state = optim.init(parameters(model))
        for _ in range(3):
            model, state = step(model, state, batch)
        return parameters(model)

    both(run, on_mesh, case.model, case.batch)


# -- statistics --


def updated(model, batch, loss_fn, source=kfax.ExactGGN()):
    """A state after one update and one refresh, and a product."""
    estimator = kfax.BlockDiagonalCurvature(source, example_axis="batch")

    @eqx.filter_jit
    def run(model, batch):
        state = estimator.update(estimator.init(model), loss_fn, model, batch, key=KEY)
        state = estimator.refresh(state, parameters(model), 0.1)
        return state, estimator.solve(state, parameters(model))

    kfax.check(loss_fn, model, batch, example_axis="batch")
    return run(model, batch)


@one_context
@grid(thin=4, layer=LAYERS)
def test_layers(layer, on_mesh):
    case = LAYERS[layer].build(num_examples=N)
    both(lambda model, batch: updated(model, batch, case.loss_fn), on_mesh, case.model, case.batch)


BLOCKS = {
    "expand": kfax.KroneckerFactored(),
    "reduce": kfax.KroneckerFactored(kfax.Reduce()),
    "diagonal factors": kfax.KroneckerFactored(max_dim=2),
    "diagonal": kfax.Diagonal(),
    "unit-wise": kfax.UnitWise(),
    "full": kfax.Full(),
    "likeliest": kfax.KLOptimal(),
    "identity": kfax.ScaledIdentity(),
}


@one_context
@grid(thin=3, block=BLOCKS, layer=("linear-positions", "conv2d", "embedding-positions"))
def test_blocks(block, layer, on_mesh):
    case = LAYERS[layer].build(BLOCKS[block], num_examples=N)
    both(lambda model, batch: updated(model, batch, case.loss_fn), on_mesh, case.model, case.batch)


class Scaled(eqx.Module):
    scale: jax.Array

    def __call__(self, x, *, key=None):
        return jnp.tanh(self.scale * x)


TIED = eqx.nn.Shared(
    (eqx.nn.Embedding(5, 3, key=KEY), eqx.nn.Linear(3, 5, key=KEY)),
    where=lambda pair: pair[1].weight,
    get=lambda pair: pair[0].weight,
)


def run_tied(model, token):
    embedding, head = model()
    return head(jnp.tanh(embedding(token)))


def run_masked(model, x):
    positions, mask = x.reshape(2, 4), x[:2] > 0
    outputs = jax.vmap(lambda x, present: kfax.masked(model, present)(x))(positions, mask)
    return jnp.sum(jnp.where(mask[:, None], outputs, 0), axis=0)


MODELS = {
    "attention": (Attention(KEY, True), lambda model, x: model(x)),
    "stacked": (eqx.nn.MLP(8, 3, 5, 3, scan=True, key=KEY), lambda model, x: model(x)),
    "module": (
        eqx.nn.Sequential([kfax.TaggedModule(Scaled(jnp.ones(8)), block=kfax.Full()), mlp(KEY, (8, 3))]),
        lambda model, x: model(x),
    ),
    "masked": (mlp(KEY, (4, 3)), run_masked),
    "tied": (TIED, lambda model, x: run_tied(model, jnp.int32(jnp.abs(x[0]) * 2) % 5)),
}


@one_context
@pytest.mark.parametrize("model", MODELS)
def test_models(model, on_mesh):
    network, call = MODELS[model]
    x = jax.random.normal(KEY, (N, 8))

    def loss_fn(model, batch):
        outputs = jax.vmap(functools.partial(call, model), axis_name="batch")(batch)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    both(lambda model, batch: updated(model, batch, loss_fn), on_mesh, kfax.tag(network), x)


# -- losses and sources --


SOURCES = {
    "exact": kfax.ExactGGN(),
    "propagated": kfax.CurvaturePropagation(2),
    "sampled": kfax.SampledFisher(2),
    "empirical": kfax.EmpiricalFisher(),
}
NEEDS = {"exact": "has_ggn", "propagated": "has_ggn", "sampled": "has_samples"}


@one_context
@grid(thin=3, loss=ALL_LOSSES, source=SOURCES)
def test_losses_and_sources(loss, source, on_mesh):
    case, shape = ALL_LOSSES[loss], (N, 2, 4)
    targets = case.targets(jax.random.key(2), shape)
    mask, weights = jnp.arange(2 * N).reshape(N, 2) % 3 > 0, jnp.linspace(0, 2, N)
    batch = (jax.random.normal(KEY, (N, 2, 3)), targets, mask, weights)

    def loss_fn(model, batch):
        x, targets, mask, weights = batch
        outputs = jax.vmap(jax.vmap(model), axis_name="batch")(x)
        options = {"mask": mask, "weights": weights, "mean_over_positions": True}
        return [case.make(outputs, targets, **options), 2 * case.make(outputs, targets)]

    def run(model, batch):
        values = eqx.filter_jit(lambda m, b: [loss.value() for loss in loss_fn(m, b)])(model, batch)
        return values, updated(model, batch, loss_fn, SOURCES[source])

    # An eigenvalue of the softmax vanishes: its root is that of a rounding error, and a draw multiplies it by others.
    tolerance = 1e-7 if (loss, source) == ("function-softmax", "propagated") else None
    model = kfax.tag(mlp(KEY, (3, 4)))
    if getattr(case, NEEDS.get(source, "name")):
        both(run, on_mesh, model, batch, tolerance)
    else:
        with pytest.raises(ValueError, match="`"):  # says what else there is, as on one device
            on_mesh(run, model, batch)


@pytest.mark.parametrize("matrix", ["ggn", "empirical", "hessian"])
def test_exact_matrices(matrix, on_mesh):
    source = {"ggn": kfax.ExactGGN(), "empirical": kfax.EmpiricalFisher(), "hessian": kfax.Hessian()}[matrix]
    case = make_case("mlp", "softmax", num_examples=N)
    implicit = kfax.ImplicitExactCurvature(source, solver=lx.GMRES(rtol=1e-13, atol=1e-13))
    explicit = kfax.ExplicitExactCurvature(source, inversion=kfax.Eigh())

    def run(model, batch):
        v = parameters(model)
        state = eqx.filter_jit(implicit.update)(implicit.init(model), case.loss_fn, model, batch)
        assert shardings(state.problem.batch) == shardings(batch)  # or products would not be made in parts
        state = implicit.refresh(state, v, 5.0)
        operator = implicit.as_operator(state, v, 5.0)
        found: list[Any] = [
            implicit.multiply(state, v),
            implicit.gram(state, [v]),
            implicit.solve(state, v),
            operator.mv(v),
        ]
        found.append(implicit.multiply_jacobian_transpose(state, implicit.multiply_jacobian(state, v)))
        if matrix != "hessian":
            found.append(implicit.multiply_factor(state, implicit.multiply_factor_transpose(state, v)))
        state = eqx.filter_jit(explicit.update)(explicit.init(model), case.loss_fn, model, batch)
        state = explicit.refresh(state, v, 5.0)
        return found, explicit.solve(state, v), explicit.eigenvalues(state, v), state.average

    both(run, on_mesh, case.model, case.batch)


# -- what `loss_fn` may do --


def test_explicit_axes_within_the_loss(on_mesh):
    case = make_case("mlp", "softmax", num_examples=N)

    def loss_fn(model, batch):
        arrays, rest = eqx.partition(model, eqx.is_array)

        def explicit(arrays, x):
            assert jax.typeof(x).sharding.spec[0] == "data"
            outputs = jax.vmap(eqx.combine(arrays, rest), axis_name="batch")(x)
            return jax.sharding.reshard(outputs, PartitionSpec("data"))

        run: Any = jax.sharding.explicit_axes(explicit, in_sharding=(PartitionSpec(), PartitionSpec("data")))
        return kfax.softmax_cross_entropy(run(arrays, batch[0]), batch[1])

    found = on_mesh(lambda model, batch: updated(model, batch, loss_fn), case.model, case.batch)
    assert_close(on_host(found), on_host(updated(case.model, case.batch, case.loss_fn)))


def test_what_needs_explicit_axes_is_told_where_it_belongs(on_mesh):
    case = make_case("mlp", "softmax", num_examples=N)

    def reshards(model, batch):
        outputs = jax.sharding.reshard(jax.vmap(model)(batch[0]), PartitionSpec("data"))
        return kfax.softmax_cross_entropy(outputs, batch[1])

    def run(model, batch):
        scale = model.layers[0].weight[0, 0]

        def closes_over_an_array(model, batch):
            return kfax.softmax_cross_entropy(jax.vmap(model)(scale * batch[0]), batch[1])

        for loss_fn in (closes_over_an_array, reshards):
            with pytest.raises(ValueError) as caught:
                kfax.check(loss_fn, model, batch)
            assert any("`jax.sharding.explicit_axes`" in note for note in caught.value.__notes__)

    on_mesh(run, case.model, case.batch)

"""Every layer of `equinox.nn`: it has a block, is left as it is, and its block is what it should be."""

import dataclasses
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close, parameters
from jax.flatten_util import ravel_pytree
from layer_cases import CONTAINERS, LAYERS, REPARAMETRIZATIONS, WITHOUT_PARAMETERS
from reference import ggn

import kfax
from kfax._layers import from_matrices, to_matrices


SOME_LAYERS = ("linear-positions", "conv1d", "layer-norm-positions", "group-norm", "prelu-features", "embedding")
GRADIENT_BLOCKS = {"diagonal": kfax.Diagonal(), "unit-wise": kfax.UnitWise(), "full": kfax.Full()}


def modules():
    found = [item for item in vars(eqx.nn).values() if inspect.isclass(item) and issubclass(item, eqx.Module)]
    return set(found) - {eqx.nn.StatefulLayer, eqx.nn.State, eqx.nn.StateIndex}


# -- must show 1: nothing in `equinox.nn` is without a block --


def test_every_layer_of_equinox_is_known():
    """A new layer in Equinox makes this fail, whether it has parameters or not."""
    covered = {row.module for row in LAYERS.values()} | CONTAINERS | set(REPARAMETRIZATIONS)
    assert modules() == covered | WITHOUT_PARAMETERS


@grid(name=LAYERS)
def test_every_layer_has_a_block(name):
    case = LAYERS[name].build()
    assert isinstance(case.model.layer, LAYERS[name].tagged)
    assert kfax.coverage(case.model).missing == ()
    blocks = {row.block for row in kfax.coverage(case.model).rows if row.path.startswith(".layer")}
    normalizes = LAYERS[name].tagged in (kfax.TaggedNorm, kfax.TaggedBatchNorm, kfax.TaggedPReLU)
    assert blocks == {"UnitWise()" if normalizes else "KroneckerFactored(Expand())"}


@grid(name=LAYERS)
def test_a_tagged_layer_computes_the_same(name):
    case = LAYERS[name].build()
    expected, found = (eqx.filter_jit(case.outputs)(model, case.x) for model in (case.plain, case.model))
    assert jnp.array_equal(found, expected)
    assert eqx.tree_equal(kfax.untag(case.model), case.plain)


@grid(thin=3, name=LAYERS)
def test_the_check_finds_nothing(name):
    """The gradient that follows from what was observed is the true one."""
    case = LAYERS[name].build()
    kfax.check(case.loss_fn, case.model, case.batch)


@grid(name=LAYERS)
def test_matrices_and_back(name):
    tree = parameters(LAYERS[name].build().model)
    doubled = {key: 2 * matrix for key, matrix in to_matrices(tree).items()}
    assert_close(from_matrices(tree, doubled), jax.tree.map(lambda x: 2 * x, tree))
    assert sum(matrix.size for matrix in doubled.values()) == sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("cls", REPARAMETRIZATIONS, ids=lambda cls: cls.__name__)
def test_reparametrizations_are_left_to_an_explicit_choice(cls, key):
    model = {"first": REPARAMETRIZATIONS[cls](key), "last": eqx.nn.Linear(4, 2, key=key)}
    with pytest.raises(ValueError, match=r"(?s)no curvature block: `\['first'\].*kfax.TaggedModule\(module, "):
        kfax.tag(model)
    chosen = kfax.tag(model | {"first": kfax.TaggedModule(model["first"], block=kfax.Diagonal())})
    assert kfax.coverage(chosen).missing == ()
    frozen = kfax.tag(model, frozen=lambda m: m["first"])
    assert type(frozen["first"]) is cls


# -- and the block is what it should be --


def update(case, example_axis, source=None):
    estimator = kfax.BlockDiagonalCurvature(source or kfax.ExactGGN(), example_axis=example_axis)

    @eqx.filter_jit
    def run(model, batch):
        return estimator.update(estimator.init(model), case.loss_fn, model, batch)

    return estimator, run(case.model, case.batch)


def exact_block(case):
    """The generalized Gauss-Newton matrix in the parameters of the layer, from jacobians."""
    params, static = eqx.partition(case.plain.layer, eqx.is_inexact_array)

    def outputs(params):
        model = eqx.tree_at(lambda m: m.layer, case.plain, eqx.combine(params, static))
        return case.outputs(model, case.x)

    return ggn(outputs, params, case.one, case.y)


def same_operation(case):
    """Which pairs of the layer's parameters belong to one operation, and which of those to one unit (row of V)."""
    tree = parameters(case.model.layer)
    matrices = to_matrices(tree)
    stamped = {}
    for i, (key, matrix) in enumerate(matrices.items()):
        units = jnp.arange(matrix.size // matrix.shape[-1]).reshape(*matrix.shape[:-1], 1)
        stamped[key] = jnp.broadcast_to(1000.0 * (i + 1) + units, matrix.shape)
    stamps = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(from_matrices(tree, stamped))])
    operations = stamps // 1000
    return operations[:, None] == operations[None, :], stamps[:, None] == stamps[None, :]


def every_third(i, *row):
    return pytest.param(*row, marks=[pytest.mark.slow] if i % 3 else [])


def rarely(*row):
    return pytest.param(*row, marks=[] if row[0] == SOME_LAYERS[0] else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("name", "block", "axis"),
    [
        *(every_third(i, name, "full", "batch") for i, name in enumerate(LAYERS)),
        *(rarely(name, block, "batch") for name in SOME_LAYERS for block in ("diagonal", "unit-wise")),
        *(rarely(name, "full", None) for name in SOME_LAYERS),
    ],
)
def test_gradient_blocks_are_exact_in_what_they_keep(name, block, axis):
    """Exact case 9, for any network and any number of positions or uses."""
    case = LAYERS[name].build(GRADIENT_BLOCKS[block])
    estimator, state = update(case, axis)
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters(case.plain.layer)))
    found = estimator.to_dense(state, parameters(case.model))[:size, :size]
    operation, unit = same_operation(case)
    kept = {"full": operation, "unit-wise": unit, "diagonal": jnp.eye(size, dtype=bool)}[block]
    assert_close(found, jnp.where(kept, exact_block(case), 0))


@grid(
    slow=lambda name, block: name not in ("conv2d-depthwise", "group-norm", "gru"),
    name=LAYERS,
    block=["default", "identity", "full"],
)
def test_inverse_power_and_determinant_of_every_layer(name, block):
    """Whatever the block's view of the layer: stacks, groups, several operations."""
    chosen = {"default": None, "identity": kfax.ScaledIdentity(), "full": kfax.Full(inversion=kfax.Eigh())}[block]
    case = LAYERS[name].build()
    if chosen is not None:  # of all layers
        case = dataclasses.replace(case, model=kfax.set_block(case.model, lambda m: m, chosen))
    estimator, state = update(case, "batch")
    p = kfax.parameters_of(case.model)
    flat, unravel = ravel_pytree(p)
    matrix, v = estimator.to_dense(state, p), jnp.cos(jnp.arange(flat.size))
    if block == "identity":
        layer = to_matrices(estimator.diagonal(state, p))
        exact = to_matrices(_exact_diagonal(case, p))
        for key, diagonal in layer.items():
            mean = jnp.mean(exact[key], axis=(-2, -1), keepdims=True)
            assert_close(diagonal, jnp.broadcast_to(mean, diagonal.shape))

    @eqx.filter_jit
    def run(state, v):
        spectrum = estimator.decompose(state, p)
        solved = estimator.solve(estimator.refresh(state, p, 0.1), unravel(v))
        return (
            spectrum.power(unravel(v), -0.5, 0.1),
            spectrum.logdet(0.1),
            solved,
            estimator.multiply(state, unravel(v)),
        )

    root, logdet, solved, product = run(state, v)
    damped = matrix + 0.1 * jnp.eye(len(matrix))
    values, vectors = jnp.linalg.eigh(damped)
    assert_close(ravel_pytree(root)[0], (vectors * values**-0.5) @ vectors.T @ v, tolerance=1e-9)
    assert_close(logdet, jnp.sum(jnp.log(values)))
    assert_close(ravel_pytree(product)[0], matrix @ v)
    if block != "default":
        assert_close(ravel_pytree(solved)[0], jnp.linalg.solve(damped, v), tolerance=1e-9)


def _exact_diagonal(case, p):
    """By `Diagonal` blocks, which another test proves."""
    model = kfax.set_block(case.model, lambda m: m, kfax.Diagonal())
    diagonal = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    run = eqx.filter_jit(lambda m: diagonal.update(diagonal.init(m), case.loss_fn, m, case.batch))
    found = diagonal.diagonal(run(model), kfax.parameters_of(model))
    return jax.tree.unflatten(jax.tree.structure(p), jax.tree.leaves(found))


# Relative errors in the Frobenius norm of each layer's default block, against the exact block of the same operations.
DEFAULT_ERRORS = {
    "linear": "0.254",
    "linear-no-bias": "0.325",
    "linear-scalar": "0.067",
    "linear-positions": "0.481",
    "conv": "0.844",
    "conv1d": "0.624",
    "conv2d": "0.737",
    "conv2d-reflect": "0.768",
    "conv2d-depthwise": "0.708",
    "conv3d": "0.730",
    "conv-transpose": "0.711",
    "conv-transpose1d": "0.906",
    "conv-transpose2d": "0.904",
    "conv-transpose3d": "0.306",
    "layer-norm": "0.751",
    "layer-norm-positions": "0.714",
    "rms-norm": "0.577",
    "group-norm": "0.578",
    "batch-norm": "0.431",
    "prelu": "0.000",
    "prelu-features": "0.314",
    "prelu-channels": "0.061",
    "embedding": "0.489",
    "embedding-positions": "0.763",
    "gru": "0.719",
    "gru-no-bias": "0.802",
    "lstm": "0.708",
}


@grid(thin=3, name=LAYERS)
def test_default_blocks_are_as_close_as_they_are_said_to_be(name):
    """A change of any of these numbers is a change of what is estimated."""
    case = LAYERS[name].build()
    estimator, state = update(case, "batch")
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters(case.plain.layer)))
    found = estimator.to_dense(state, parameters(case.model))[:size, :size]
    operation, unit = same_operation(case)
    exact = jnp.where(operation, exact_block(case), 0)
    error = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert f"{error:.3f}" == DEFAULT_ERRORS[name], f"{name}: {error:.3f}"
    if isinstance(case.model.layer.block, kfax.UnitWise):
        assert_close(found, jnp.where(unit, exact, 0))

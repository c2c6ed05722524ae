"""The products that are made of weighted gradients of examples, against the exact blocks.

These are made here from jacobians, as are the nearest products: by a singular value decomposition of the rearranged
matrix, and by the alternating iteration for the maximum likelihood.
"""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close, random
from jax.flatten_util import ravel_pytree
from layer_cases import LAYERS
from reference import ggn, squared_loss
from use_cases import Once, Padded, Scenario, Sharing, Twice, WEIGHTS, X

import kfax
from kfax._capture import Problem


BLOCKS = {"tensor": kfax.TensorNormal(), "frobenius": kfax.FrobeniusOptimal(), "kl": kfax.KLOptimal()}
# Of `kfax.KLOptimal`, in units of the mean eigenvalue of the exact block.
DAMPING = 0.01


def passes(model, loss_fn, batch, damping, number, decay=0.95):
    """The estimator, and its state after a number of passes over the batch with a refresh before each but the first."""
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=decay, example_axis="batch")
    p = kfax.parameters_of(model)

    @eqx.filter_jit
    def run(model, batch):
        def one(state, _):
            state = estimator.restart(estimator.refresh(state, p, damping), p)
            return estimator.update(state, loss_fn, model, batch), None

        state = estimator.update(estimator.init(model), loss_fn, model, batch)
        return jax.lax.scan(one, state, length=number - 1)[0]

    return estimator, run(model, batch)


def exact_matrix(case, plain, x, y, weights=None):
    p, rest = eqx.partition(plain, eqx.is_inexact_array)
    return jax.jit(lambda p: ggn(lambda p: case.outputs(eqx.combine(p, rest), x), p, squared_loss, y, weights))(p)


def exact_blocks(exact, model, estimator, state, only=""):
    """Each block with the part of the exact matrix that is its own, `(matrices, d_g, d_a, d_g, d_a)`."""
    p = kfax.parameters_of(model)
    flat, unravel = ravel_pytree(p)
    indices = kfax.to_matrices(unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    for key, block in estimator.blocks(state, p).items():
        if key.startswith(only):
            shape = block.shape
            rows = indices[key].astype(int).reshape(shape.num_matrices, -1)
            own = jnp.stack([exact[i][:, i] for i in rows])
            yield block, own.reshape(-1, *2 * (shape.d_g, shape.d_a))


def as_matrices(factor, shape, size):
    """Those of a stack, dense; of `None` the identity."""
    if factor is None:
        return jnp.broadcast_to(jnp.eye(size), (shape.num_matrices, size, size))
    is_dense = factor.ndim == len(shape.leading) + 2
    return factor.reshape(-1, size, size) if is_dense else jax.vmap(jnp.diag)(factor.reshape(-1, size))


def restricted(factor, like, shape):
    """Its diagonal, if another factor is a diagonal."""
    is_dense = like.ndim == len(shape.leading) + 2
    return factor if is_dense else factor * jnp.eye(factor.shape[-1])


def check_against(exact, model, estimator, state, only=""):
    """The factors are the weighted traces of the exact block, and the block is their product."""
    number = 0
    for block, own in exact_blocks(exact, model, estimator, state, only):
        if not isinstance(block.statistics, kfax.WeightedFactors):
            continue
        shape, kept = block.shape, block.statistics
        left, right = as_matrices(kept.left, shape, shape.d_g), as_matrices(kept.right, shape, shape.d_a)
        a, g = jnp.einsum("kiajb,kij->kab", own, left), jnp.einsum("kiajb,kab->kij", own, right)
        a, g = restricted(a, kept.a, shape), restricted(g, kept.g, shape)
        scale = jnp.einsum("kij,kij->k", g, left)
        assert_close(as_matrices(kept.a, shape, shape.d_a), a)
        assert_close(as_matrices(kept.g, shape, shape.d_g), g)
        assert_close(kept.scale.reshape(-1), scale)
        found = block.to_dense().reshape(shape.num_matrices, -1, shape.d_g * shape.d_a)
        safe = jnp.where(scale > 0, scale, 1)[:, None, None]
        assert_close(found, jax.vmap(jnp.kron)(g / safe, a))
        assert jnp.max(jnp.abs(own)) > 0
        is_weighted = not isinstance(block.block, kfax.TensorNormal)
        assert is_weighted is (kept.left is not None)
        if is_weighted and min(shape.d_g, shape.d_a) > 1:  # and the weights are no identities
            assert max(jnp.max(jnp.abs(w - w[:, :1, :1] * jnp.eye(w.shape[-1]))) for w in (left, right)) > 1e-3
        number += 1
    assert number


@grid(thin=6, name=LAYERS, block=BLOCKS)
def test_factors_are_weighted_traces_of_the_exact_block(name, block):
    """For `TensorNormal` these are the partial traces, and the trace of the product is that of the exact block."""
    case = LAYERS[name].build(BLOCKS[block])
    estimator, state = passes(case.model, case.loss_fn, case.batch, 0.1, 2)
    check_against(exact_matrix(case, case.plain, case.x, case.y), case.model, estimator, state, ".layer")


class Reversed(eqx.Module):
    """An embedding of which only the transpose is used."""

    pair: eqx.nn.Shared
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(1), 3)
        layers = eqx.nn.Embedding(5, 3, key=keys[0]), eqx.nn.Linear(3, 5, key=keys[1])
        self.pair = eqx.nn.Shared(layers, where=lambda p: p[1].weight, get=lambda p: p[0].weight)
        self.head = eqx.nn.Linear(5, 2, key=keys[2])

    def __call__(self, x):
        _, reverse = self.pair()
        return self.head(jnp.tanh(reverse(x)))


SCENARIOS = {
    "reversed": Scenario(Reversed(), X),
    "once": Scenario(Once(), X),
    "once-weighted": Scenario(Once(), X, WEIGHTS),
    "twice": Scenario(Twice(), X),
    "padded": Scenario(Padded(), X, WEIGHTS),
    "tied-and-derivatives": Scenario(Sharing(), X, WEIGHTS),
}
LIMITED = {"once-weighted": kfax.KLOptimal(max_dim=3, inversion=kfax.Eigh()), "twice": kfax.FrobeniusOptimal(max_dim=3)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_however_often_a_layer_is_used(name):
    case = SCENARIOS[name]
    model, y = kfax.tag(case.model, block=LIMITED.get(name, kfax.FrobeniusOptimal())), random(4, 4, 2)
    estimator, state = passes(model, case.loss_fn, (case.x, y), 0.1, 2)
    check_against(exact_matrix(case, case.model, case.x, y, case.weights), model, estimator, state)


@pytest.mark.parametrize(("make", "keeps"), [(Once, {".head"}), (Twice, {".layer", ".stack"})])
def test_layers_that_are_used_once_take_no_memory_for_each_example(make, keeps):
    model = kfax.tag(make(), block=kfax.TensorNormal())
    case, estimator = Scenario(model, X), kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = estimator.init(model)

    def observe():
        problem = Problem(case.loss_fn, model, (case.x, random(4, 4, 2)))
        return estimator.linearize(problem, state).observe((jnp.ones((4, 2)),))

    recorded = eqx.filter_eval_shape(observe)
    assert {key for key, each in recorded.items() if not isinstance(each.cotangents, tuple)} == keeps


# -- where it leads --


def nearest(block, own):
    """The best Kronecker product in the Frobenius norm, of one matrix; among those with diagonals as the block has."""
    shape, kept = block.shape, block.statistics
    matrix = own.transpose(0, 2, 1, 3)
    diagonals = [factor.ndim == len(shape.leading) + 1 for factor in (kept.g, kept.a)]
    if diagonals[1]:
        matrix = matrix * jnp.eye(shape.d_a)
    assert not diagonals[0]
    left, values, right = jnp.linalg.svd(matrix.reshape(shape.d_g**2, shape.d_a**2))
    return jnp.kron(values[0] * left[:, 0].reshape(shape.d_g, -1), right[0].reshape(shape.d_a, -1))


def likeliest(own):
    """The maximum-likelihood product, one side after the other until nothing changes."""
    d_g, d_a, *_ = own.shape

    def one(pair, _):
        g, _ = pair
        a = jnp.einsum("iajb,ij->ab", own, jnp.linalg.inv(g)) / d_g
        return (jnp.einsum("iajb,ab->ij", own, jnp.linalg.inv(a)) / d_a, a), None

    (g, a), _ = jax.lax.scan(one, (jnp.eye(d_g), jnp.eye(d_a)), length=300)
    return jnp.kron(g, a)


@grid(thin=3, name=["linear", "linear-positions", "conv1d", "embedding-positions", "gru", "group-norm"])
def test_passes_lead_to_the_nearest_product(name):
    case = LAYERS[name].build(kfax.FrobeniusOptimal())
    estimator, state = passes(case.model, case.loss_fn, case.batch, 0.1, 60)
    exact = exact_matrix(case, case.plain, case.x, case.y)
    for block, own in exact_blocks(exact, case.model, estimator, state, ".layer"):
        expected = jnp.stack([nearest(block, each) for each in own])
        assert_close(block.to_dense().reshape(expected.shape), expected, tolerance=1e-8)


@grid(thin=2, name=["linear", "linear-no-bias"], inversion=[kfax.Cholesky(), kfax.Eigh()])
def test_passes_lead_to_the_maximum_likelihood(name, inversion):
    case = LAYERS[name].build(kfax.KLOptimal(inversion=inversion), num_examples=12)
    estimator, state = passes(case.model, case.loss_fn, case.batch, 1e-24, 80)
    exact = exact_matrix(case, case.plain, case.x, case.y)
    for block, own in exact_blocks(exact, case.model, estimator, state, ".layer"):
        expected = jax.vmap(likeliest)(own)
        assert_close(block.to_dense().reshape(expected.shape), expected, tolerance=1e-8)


# -- as the documentation has it --


# By place, and after how many passes; of those between, `test_eigenvalue_corrected.py` has the errors.
COLUMNS = {
    "K-FAC, `Expand()`": (1, kfax.KroneckerFactored(), 1),
    "K-FAC, `Reduce()`": (3, kfax.KroneckerFactored(kfax.Reduce()), 1),
    "`TensorNormal()`": (5, kfax.TensorNormal(), 1),
    "`FrobeniusOptimal()`": (6, kfax.FrobeniusOptimal(), 60),
    "`KLOptimal()`": (7, kfax.KLOptimal(), 60),
}
ROWS = {
    "linear": "dense",
    "linear-positions": "dense, at 2 positions",
    "conv2d": "two-dimensional convolution",
    "conv-transpose": "transposed convolution",
    "embedding": "embedding",
    "gru": "GRU cell",
    "lstm": "LSTM cell",
}


def documented(row, column):
    """The numbers of a layer and a block in both tables."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "choosing.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    place = COLUMNS[column][0]
    assert [line[place] for line in lines if len(line) == 8 and line[0] == "layer"] == [column] * 2
    return [line[place] for line in lines if len(line) == 8 and line[0] == ROWS[row]]


@grid(thin=6, name=ROWS, column=COLUMNS)
def test_distances_are_those_of_the_documentation(name, column):
    _, block, number = COLUMNS[column]
    case = LAYERS[name].build(block)
    exact = exact_matrix(case, case.plain, case.x, case.y)
    size = ravel_pytree(eqx.filter(case.plain.layer, eqx.is_inexact_array))[0].size
    damping = DAMPING * float(jnp.trace(exact[:size, :size])) / size
    estimator, state = passes(case.model, case.loss_fn, case.batch, damping, number)
    error, norm, divergence = 0.0, 0.0, 0.0
    for block, own in exact_blocks(exact, case.model, estimator, state, ".layer"):
        own = own.reshape(len(own), -1, block.shape.d_g * block.shape.d_a)
        found = block.to_dense().reshape(own.shape)
        error, norm = error + jnp.sum((found - own) ** 2), norm + jnp.sum(own**2)
        p, c = (matrix + damping * jnp.eye(own.shape[-1]) for matrix in (found, own))
        logdets = jnp.linalg.slogdet(p)[1] - jnp.linalg.slogdet(c)[1]
        divergence += jnp.sum(jnp.trace(jnp.linalg.solve(p, c), axis1=1, axis2=2) - own.shape[-1] + logdets) / 2
    assert [f"{jnp.sqrt(error / norm):.2f}", f"{divergence / size:.2f}"] == documented(name, column)

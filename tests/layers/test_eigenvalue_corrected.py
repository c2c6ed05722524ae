"""Eigenvalue-corrected blocks: their eigenvalues are exactly the diagonal of the exact block in their basis.

The exact blocks are made here from jacobians, and so are the Kronecker blocks that they are compared with, from the
factors.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close, parameters, random
from jax.flatten_util import ravel_pytree
from layer_cases import LAYERS
from reference import ggn, squared_loss
from use_cases import Once, Padded, Scenario, Sharing, Twice, WEIGHTS, X

import kfax
from kfax._capture import Problem


SHARINGS = {"expand": kfax.Expand(), "reduce": kfax.Reduce()}
FACTORED = {name: row for name, row in LAYERS.items() if row.tagged not in (kfax.TaggedNorm, kfax.TaggedPReLU)}
FACTORED.pop("batch-norm")


def two_passes(model, loss_fn, batch, example_axis="batch", source=None):
    """The estimator, and its state after a pass, a refresh, and another pass in the basis that was found."""
    estimator = kfax.BlockDiagonalCurvature(source or kfax.ExactGGN(), example_axis=example_axis)
    p = kfax.parameters_of(model)

    @eqx.filter_jit
    def run(model, batch):
        state = estimator.update(estimator.init(model), loss_fn, model, batch)
        state = estimator.restart(estimator.refresh(state, p, 0.1), p)
        return estimator.update(state, loss_fn, model, batch)

    return estimator, run(model, batch)


def dense_bases(block):
    """The bases of each matrix of a stack, as dense matrices."""
    statistics, shape = block.statistics, block.shape
    sides = ((statistics.left, shape.d_g), (statistics.right, shape.d_a))
    eyes = [jnp.broadcast_to(jnp.eye(d), (*shape.leading, d, d)) if q is None else q for q, d in sides]
    return [q.reshape(-1, *q.shape[-2:]) for q in eyes]


def kronecker_factored(block):
    """`G ⊗ A / R` of each matrix of a stack."""
    factors, shape = block.statistics.factors, block.shape
    pairs = ((factors.g, shape.d_g), (factors.a, shape.d_a))
    g, a = (f.reshape(-1, d, d) if f.ndim == len(shape.leading) + 2 else jax.vmap(jnp.diag)(f.reshape(-1, d))
            for f, d in pairs)  # fmt: skip
    r = jnp.broadcast_to(factors.positions, shape.leading).reshape(-1, 1, 1)
    return jax.vmap(jnp.kron)(g, a) / jnp.where(r > 0, r, 1)


def check_against(exact, model, estimator, state, only=""):
    """Compares all corrected blocks with the dense matrix of all parameters, and returns their relative error."""
    p = kfax.parameters_of(model)
    flat, unravel = ravel_pytree(p)
    indices = kfax.to_matrices(unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    spectra, errors, norms = estimator.decompose(state, p).spectra, [], []
    for key, block in estimator.blocks(state, p).items():
        if not key.startswith(only) or not isinstance(block.block, kfax.EigenvalueCorrected):
            continue
        shape = block.shape
        rows = indices[key].astype(int).reshape(shape.num_matrices, -1)
        blocks = jnp.stack([exact[i][:, i] for i in rows])
        left, right = dense_bases(block)
        assert_close(left.mT @ left, jnp.broadcast_to(jnp.eye(shape.d_g), left.shape))
        vectors = jax.vmap(jnp.kron)(left, right)
        expected = jnp.einsum("kij,kil,klj->kj", vectors, blocks, vectors)
        assert_close(spectra[key].values.reshape(expected.shape), expected)
        found = block.to_dense().reshape(blocks.shape)
        assert_close(found, jnp.einsum("kij,kj,klj->kil", vectors, expected, vectors))
        assert_close(jnp.trace(found, axis1=1, axis2=2), jnp.trace(blocks, axis1=1, axis2=2))
        assert jnp.max(jnp.abs(blocks)) > 0
        error, uncorrected = (jnp.linalg.norm(m - blocks) for m in (found, kronecker_factored(block)))
        assert error <= uncorrected * (1 + 1e-12) + 1e-12 * jnp.linalg.norm(blocks), key
        errors.append(error)
        norms.append(jnp.linalg.norm(blocks))
    return float(jnp.linalg.norm(jnp.stack(errors)) / jnp.linalg.norm(jnp.stack(norms)))


@grid(thin=3, name=FACTORED, sharing=SHARINGS)
def test_eigenvalues_are_the_diagonal_of_the_exact_block(name, sharing):
    case = FACTORED[name].build(kfax.EigenvalueCorrected(SHARINGS[sharing]))
    estimator, state = two_passes(case.model, case.loss_fn, case.batch)
    p, rest = eqx.partition(case.plain, eqx.is_inexact_array)
    exact = jax.jit(lambda p: ggn(lambda p: case.outputs(eqx.combine(p, rest), case.x), p, squared_loss, case.y))(p)
    error = check_against(exact, case.model, estimator, state, only=".layer")
    if name in ERRORS:
        assert f"{error:.2f}" == ERRORS[name][list(SHARINGS).index(sharing)]


# As docs/choosing.md has them, with either sharing.
ERRORS = {
    "linear": ("0.24", "0.24"),
    "linear-positions": ("0.30", "0.26"),
    "conv2d": ("0.69", "0.86"),
    "conv-transpose": ("0.67", "0.59"),
    "embedding": ("0.29", "0.29"),
    "gru": ("0.61", "0.40"),
    "lstm": ("0.55", "0.37"),
}


# -- layers that are used in other ways --


SCENARIOS = {
    "once": Scenario(Once(), X),
    "once-weighted": Scenario(Once(), X, WEIGHTS, kfax.EigenvalueCorrected(max_dim=3)),
    "twice": Scenario(Twice(), X, None, kfax.EigenvalueCorrected(max_dim=3)),
    "twice-weighted": Scenario(Twice(), X, WEIGHTS),
    "padded": Scenario(Padded(), X, WEIGHTS, kfax.EigenvalueCorrected(kfax.Reduce())),
    "tied-and-derivatives": Scenario(Sharing(), X, WEIGHTS),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_however_often_a_layer_is_used(name):
    case = SCENARIOS[name]
    model, y = kfax.tag(case.model, block=case.block), random(4, 4, 2)
    estimator, state = two_passes(model, case.loss_fn, (case.x, y))
    p, rest = eqx.partition(case.model, eqx.is_inexact_array)
    exact = ggn(lambda p: case.outputs(eqx.combine(p, rest), case.x), p, squared_loss, y, case.weights)
    check_against(exact, model, estimator, state)


# -- what that takes --


class Wrapped(eqx.Module):
    """A layer that is called once, by a function whose derivative is written out and may call it again; one that is
    traced once and called twice; and one in a branch.
    """

    layer: eqx.nn.Linear
    again: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        self.layer, self.again, self.head = Once().layer, Twice().layer, Once().head

    def __call__(self, x):
        @jax.custom_jvp
        def call(x):
            return self.layer(x)

        call.defjvp(lambda x, dx: (self.layer(*x), 2 * self.layer(*x) - self.layer(*x)))
        again = jax.jit(lambda x: jnp.tanh(self.again(x)))
        x = call(again(again(x)))
        return jax.lax.cond(jnp.sum(self.head.weight) > -1e9, lambda x: self.head(x), lambda x: x[:2], x)


KEEPS_EXAMPLES = {
    "once": (Once, {".layer": False, ".stack": False, ".head": True}),
    "twice": (Twice, {".layer": True, ".stack": True, ".head": False}),
    "derivatives": (Sharing, {".pair.pytree[0]": True, ".pair.pytree[1]": True, ".head": True}),
    "wrapped": (Wrapped, {".layer": True, ".again": True, ".head": False}),
}


@pytest.mark.parametrize("name", KEEPS_EXAMPLES)
def test_layers_that_are_used_once_take_no_memory_for_each_example(name):
    """Others must, for gradients are squared when they are complete: where kfax cannot tell they count as others."""
    make, expected = KEEPS_EXAMPLES[name]
    model = kfax.tag(make(), block=kfax.EigenvalueCorrected())
    case = Scenario(model, random(3, 4, 3))
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = estimator.init(model)

    def observe():
        problem = Problem(case.loss_fn, model, (case.x, random(4, 4, 2)))
        return estimator.linearize(problem, state).observe((jnp.ones((4, 2)),))

    recorded = eqx.filter_eval_shape(observe)
    shapes = {key: block.shape for key, block in estimator.blocks(state, parameters(model)).items()}
    keeps = {key: each.cotangents[1].ndim > len(shapes[key].leading) + 2 for key, each in recorded.items()}
    assert keeps == expected

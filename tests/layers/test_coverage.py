"""Sizes of factors, and what `kfax.coverage` says of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from cases import grid
from helpers import assert_close, mlp, parameters
from jax.flatten_util import ravel_pytree
from layer_updates import squared, update
from reference import kronecker

import kfax
from kfax._layers import parts


KEYS = jax.random.split(jax.random.key(0), 8)


@grid(max_dim=[0, 4])
def test_long_sides_have_diagonal_factors(max_dim):
    block = kfax.KroneckerFactored(max_dim=max_dim)
    model = kfax.set_block(kfax.tag(mlp(KEYS[0], (6, 3, 5))), lambda m: m, block)
    x, y = jax.random.normal(KEYS[1], (7, 6)), jax.random.normal(KEYS[2], (7, 5))
    estimator, state = update(model, squared, (x, y))
    _, dense_state = update(kfax.tag(kfax.untag(model)), squared, (x, y))
    p = parameters(model)
    refreshed = estimator.refresh(state, p, 0.2)
    vector = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), p)
    dense = estimator.to_dense(state, p)
    assert_close(ravel_pytree(estimator.multiply(state, vector))[0], dense @ ravel_pytree(vector)[0])
    assert_close(jnp.sort(estimator.eigenvalues(state, p)), jnp.linalg.eigvalsh(dense), tolerance=1e-9)
    for key, factors in state.average.value.items():
        full = dense_state.average.value[key]
        for name, size in (("a", full.a.shape[0]), ("g", full.g.shape[0])):
            found, expected = getattr(factors, name), getattr(full, name)
            assert_close(found, jnp.diag(expected) if size > max_dim else expected)
        # Damping is that of the factors as they are kept.
        a, g = (jnp.diag(f) if f.ndim == 1 else f for f in (factors.a, factors.g))
        pi = jnp.sqrt((jnp.trace(a) / len(a)) / (jnp.trace(g) / len(g)))
        damped = kronecker(a + pi * jnp.sqrt(0.2) * jnp.eye(len(a)), g + jnp.sqrt(0.2) / pi * jnp.eye(len(g)))
        before, after = (
            parts(tree)[key].operation.to_matrix().reshape(-1) for tree in (vector, estimator.solve(refreshed, vector))
        )
        assert_close(damped @ after, before, tolerance=1e-9)  # the condition number of the damped block


def test_coverage_predicts_the_memory_of_every_block():
    model = {
        "embedding": eqx.nn.Embedding(50, 4, key=KEYS[0]),
        "conv": eqx.nn.Conv1d(4, 6, 3, groups=2, key=KEYS[1]),
        "norm": eqx.nn.LayerNorm(6),
        "cell": eqx.nn.LSTMCell(6, 3, key=KEYS[2]),
        "module": kfax.TaggedModule(eqx.nn.WeightNorm(eqx.nn.Linear(3, 2, key=KEYS[3])), block=kfax.Full()),
        "wide": kfax.TaggedLinear(eqx.nn.Linear(9, 4, key=KEYS[4]), block=kfax.KroneckerFactored(max_dim=5)),
    }
    model = kfax.tag(model)
    state = kfax.BlockDiagonalCurvature().init(model)
    coverage = kfax.coverage(model)
    leaves = jax.tree.leaves((state.average.value, state.inverses))
    assert sum(row.num_bytes for row in coverage.rows) == sum(leaf.nbytes for leaf in leaves)
    assert sum(row.num_parameters for row in coverage.rows) == sum(x.size for x in jax.tree.leaves(parameters(model)))
    by_path = {row.path: row for row in coverage.rows}
    assert by_path["['embedding']"].num_bytes == 8 * (2 * (50 + 4 * 4) + 1)  # not the square of the vocabulary
    assert by_path["['conv']"].num_bytes == 2 * 8 * (2 * (7 * 7 + 3 * 3) + 1)  # one for each group
    assert by_path["['wide']"].num_bytes == 8 * (2 * (10 + 4 * 4) + 1)
    assert all(row.update_flops > 0 and row.refresh_flops > 0 and row.solve_flops > 0 for row in coverage.rows)


def test_coverage_shows_what_is_tied():
    pair = (eqx.nn.Embedding(5, 3, key=KEYS[0]), eqx.nn.Linear(3, 5, key=KEYS[1]))
    model = kfax.tag([eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight)])
    embedding, bias = kfax.coverage(model).rows
    assert embedding.tied == ("[0].pytree[1]",)
    assert embedding.block == "KroneckerSum(Expand())"
    assert "tied to [0].pytree[1]" in str(kfax.coverage(model))
    assert bias.parameters == (("bias", (5,)),)


def test_coverage_says_what_many_layers_cost_to_compile():
    def model(depth):
        return kfax.tag(mlp(KEYS[0], (2,) * (depth + 1)))

    assert "jax.lax.scan" not in str(kfax.coverage(model(30)))
    assert "Each of 31 blocks adds to the time to compile" in str(kfax.coverage(model(31)))

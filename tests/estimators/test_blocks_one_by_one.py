"""The curvature of single layers, and the matrices on which it acts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import make_case
from helpers import assert_close, mlp, parameters
from jax.flatten_util import ravel_pytree

import kfax


def test_factors_matrix_and_spectrum_of_one_layer():
    """Against A and G made of jacobians, for a loss with H = 2I."""
    case = make_case("mlp", "squared")
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = estimator.update(estimator.init(case.model), case.loss_fn, case.model, case.batch)
    block = estimator.blocks(state, kfax.parameters_of(case.model))[".layers[0]"]
    plain, x = kfax.untag(case.model), case.x
    inputs = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
    a = inputs.T @ inputs / len(x)

    def rest(h):
        for layer in plain.layers[1:]:
            h = layer(h)
        return h

    jacobian = jax.vmap(jax.jacrev(rest))(jax.vmap(plain.layers[0])(x))
    g = 2 * jnp.einsum("nci,ncj->ij", jacobian, jacobian) / len(x)
    assert_close((block.statistics.a, block.statistics.g), (a, g))
    dense = jnp.kron(g, a)
    assert_close(block.to_dense(), dense)
    v = jax.random.normal(jax.random.key(0), (5, 9))
    assert_close(block.multiply(v).reshape(-1), dense @ v.reshape(-1))
    assert_close(block.diagonal().reshape(-1), jnp.diag(dense))
    solved = jnp.linalg.solve(dense + 0.1 * jnp.eye(len(dense)), v.reshape(-1))
    # Eigenvalues are exact to rounding relative to the largest one.
    assert_close(block.spectrum().power(v, -1, 0.1).reshape(-1), solved, 1e-8)
    with pytest.raises(ValueError, match=r"matrix of shape \(5, 9\) for this block, got \(9, 5\)"):
        block.multiply(v.T)
    with pytest.raises(ValueError, match="Vectors are like `kfax.parameters_of"):
        estimator.blocks(state, plain)


@pytest.mark.parametrize(
    "block", [kfax.Diagonal(), kfax.UnitWise(), kfax.Full(), kfax.TensorNormal(), kfax.KroneckerFactored()]
)
def test_blocks_make_up_the_whole(block):
    model = kfax.tag(mlp(jax.random.key(0), (4, 3, 2)), block=block)
    x = jax.random.normal(jax.random.key(1), (6, 4))

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(model)(batch), batch[:, :2])

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = estimator.update(estimator.init(model), loss_fn, model, x)
    p = kfax.parameters_of(model)
    blocks, v = estimator.blocks(state, p), jax.tree.map(jnp.cos, p)
    matrices = kfax.to_matrices(v)
    product = kfax.from_matrices(v, {key: blocks[key].multiply(matrices[key]) for key in blocks})
    assert_close(ravel_pytree(product)[0], estimator.to_dense(state, p) @ ravel_pytree(v)[0])
    logdet = sum(each.spectrum().logdet(0.1) for each in blocks.values())
    dense = estimator.to_dense(state, p)
    assert_close(logdet, jnp.linalg.slogdet(dense + 0.1 * jnp.eye(len(dense)))[1], 1e-9)


def test_matrices_and_back():
    plain = mlp(jax.random.key(0), (4, 3, 2))
    model = kfax.tag(plain)
    matrices = kfax.to_matrices(kfax.parameters_of(model))
    first = plain.layers[0]
    assert list(matrices) == [".layers[0]", ".layers[2]"]
    assert_close(matrices[".layers[0]"], jnp.concatenate([first.weight, first.bias[:, None]], axis=1))
    doubled = kfax.from_matrices(parameters(model), {key: 2 * matrix for key, matrix in matrices.items()})
    assert bool(eqx.tree_equal(doubled, jax.tree.map(lambda x: 2 * x, parameters(model))))
    with pytest.raises(ValueError, match="no tagged layer here"):
        kfax.to_matrices(plain)
    for wrong in (matrices | {"head": jnp.ones(3)}, {}, {key: matrix.T for key, matrix in matrices.items()}):
        with pytest.raises(ValueError, match="`matrices` must have the keys and shapes"):
            kfax.from_matrices(parameters(model), wrong)

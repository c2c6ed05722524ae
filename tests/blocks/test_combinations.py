"""Every loss with every matrix, for all three estimators, against dense matrices in the parameters, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import ALL_LOSSES, grid
from helpers import assert_close, layer_groups, mlp, parameters
from jax.flatten_util import ravel_pytree
from reference import block_diagonal, gaussian_nll_fisher, jacobians, output_hessians

import kfax


MATRICES = {
    "ggn": kfax.ExactGGN(),
    "fisher": kfax.ExactFisher(),
    "empirical": kfax.EmpiricalFisher(),
    "hessian": kfax.Hessian(),
}
REGISTRY = kfax.default_registry.register(eqx.nn.Linear, lambda m: kfax.TaggedLinear(m, block=kfax.Full()))
MODEL = kfax.tag(mlp(jax.random.key(0), (3, 3, 4)), registry=REGISTRY)
X = jax.random.normal(jax.random.key(1), (5, 3))
WEIGHTS = jnp.array([1.0, 0.5, 0.0, 2.0, 1.5])


def outputs(p):
    rest = eqx.filter(MODEL, eqx.is_inexact_array, inverse=True)
    return jax.vmap(kfax.untag(eqx.combine(p, rest)))(X)


def truth(case, targets, matrix):
    """The matrix in the parameters, of the weighted mean over examples."""
    p, w = parameters(MODEL), WEIGHTS / WEIGHTS.sum()
    flat, unravel = ravel_pytree(p)

    def losses(v):
        return jax.vmap(case.one)(outputs(unravel(v)), targets)

    if matrix == "hessian":
        return jax.jit(jax.hessian(lambda v: losses(v) @ w))(flat)
    if matrix == "empirical":
        gradients = jax.jit(jax.jacrev(losses))(flat)
        return jnp.einsum("n,ni,nj->ij", w, gradients, gradients)
    if case.name == "gaussian_nll":
        h = jax.vmap(gaussian_nll_fisher)(outputs(p))
    else:
        h = output_hessians(case.one, outputs(p), targets)
    j = jacobians(outputs, p)
    return jnp.einsum("n,nci,ncd,ndj->ij", w, j, h, j)


@grid(loss=ALL_LOSSES, matrix=MATRICES)
def test_every_loss_with_every_matrix(loss, matrix):
    case, source = ALL_LOSSES[loss], MATRICES[matrix]
    p = parameters(MODEL)
    targets = case.targets(jax.random.key(2), outputs(p).shape)

    def loss_fn(model, batch):
        return 3 * case.make(jax.vmap(model)(batch[0]), batch[1], weights=WEIGHTS)

    def update(estimator):
        return eqx.filter_jit(lambda m: estimator.update(estimator.init(m), loss_fn, m, (X, targets)))(MODEL)

    estimators = [kfax.ExplicitExactCurvature(source), kfax.ImplicitExactCurvature(source)]
    if not isinstance(source, kfax.Hessian):
        estimators.append(kfax.BlockDiagonalCurvature(source))
    if not getattr(case, {"ggn": "has_ggn", "fisher": "has_fisher"}.get(matrix, "name")):
        for estimator in estimators:
            with pytest.raises(ValueError, match="as the source of curvature"):
                estimator.multiply(update(estimator), p)
        return
    expected = 3 * truth(case, targets, matrix)
    groups = layer_groups(MODEL, [row.path for row in kfax.coverage(MODEL).rows])
    for estimator in estimators:
        is_exact = not isinstance(estimator, kfax.BlockDiagonalCurvature)
        matrix_found = eqx.filter_jit(estimator.to_dense)(update(estimator), p)
        assert_close(matrix_found, expected if is_exact else block_diagonal(expected, groups))

"""Sources, and the matrices that they stand for from jacobians and Hessians."""

import equinox as eqx
import jax
import jax.numpy as jnp
from helpers import parameters
from jax.flatten_util import ravel_pytree
from reference import ggn

import kfax


SOURCES = {
    "ggn": kfax.ExactGGN(),
    "fisher": kfax.ExactFisher(),
    "empirical": kfax.EmpiricalFisher(),
    "hessian": kfax.Hessian(),
}


def truth(case, source, weights=None):
    """The matrix that a source stands for; for the three losses of the table GGN and Fisher are one."""
    p = parameters(case.model)
    if source in ("ggn", "fisher"):
        return ggn(case.outputs, p, case.one, case.y, weights)
    flat, unravel = ravel_pytree(p)
    w = jnp.ones(len(case.x)) if weights is None else weights

    def losses(v):
        return jax.vmap(case.one)(case.outputs(unravel(v)), case.y)

    if source == "hessian":
        return jax.jit(jax.hessian(lambda v: losses(v) @ w / w.sum()))(flat)
    gradients = jax.jit(jax.jacrev(losses))(flat)
    return jnp.einsum("n,ni,nj->ij", w / w.sum(), gradients, gradients)


def updated(estimator, case, key=None, **options):
    @eqx.filter_jit
    def run(model, batch):
        return estimator.update(estimator.init(model), case.loss_fn, model, batch, key=key, **options)

    return run(case.model, case.batch)


def like(case, seed):
    flat, unravel = ravel_pytree(parameters(case.model))
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape))

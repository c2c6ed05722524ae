"""Loss, gradient and curvature of a structure, dense and slow, of the model without tags."""

import equinox as eqx
import jax
import jax.numpy as jnp
import networks
import reference
from cases import ALL_LOSSES
from jax.flatten_util import ravel_pytree


SECOND = 0.3  # what the second loss, a squared error, is multiplied by


class Truth(eqx.Module):
    """Of the trained parameters, raveled."""

    loss: jax.Array
    gradient: jax.Array
    matrix: jax.Array


def make_truth(structure, network, spec):
    """A compiled function from the network's parameters and a batch; `spec` says which parameters are trained."""
    one = ALL_LOSSES[structure.loss].one

    @eqx.filter_jit
    def run(network, batch):
        network, batch = jax.tree.map(_wide, (network, batch))
        trained, rest = eqx.partition(network, spec)
        flat, unravel = ravel_pytree(trained)

        def outputs(flat):
            found = networks.outputs_of(structure, eqx.combine(unravel(flat), rest), batch)
            return found if structure.per_position else found[:, None]  # (n, positions, outputs)

        f, jacobian = outputs(flat), jax.jacrev(outputs)(flat)
        y = batch["y"] if structure.per_position else batch["y"][:, None]
        coefficients = _coefficients(structure, batch, *f.shape[:2])
        parts = [(coefficients, lambda f, y: one(f, y), y)]
        if structure.second_loss:
            parts.append((SECOND * coefficients, lambda f, y: reference.squared_loss(f, 0), y))
        loss, gradient, matrix = (jnp.zeros(()), jnp.zeros(flat.size), jnp.zeros((flat.size, flat.size)))
        columns = jnp.zeros((len(f), flat.size))
        for c, of_one, targets in parts:
            each = jax.vmap(jax.vmap(of_one))
            slope = jax.vmap(jax.vmap(jax.grad(of_one)))(f, targets)
            # What does not count has no effect, whatever it is.
            loss += jnp.sum(jnp.where(c > 0, c * each(f, targets), 0)) / len(f)
            slope = jnp.where(c[..., None] > 0, slope, 0)
            gradient += jnp.einsum("nt,ntc,ntcp->p", c, slope, jacobian) / len(f)
            columns += jnp.einsum("nt,ntc,ntcp->np", jnp.sqrt(c), slope, jacobian)
            curvature = jax.vmap(jax.vmap(jax.hessian(of_one)))(f, targets)
            if structure.source == "fisher" and structure.loss == "gaussian_nll" and of_one is parts[0][1]:
                curvature = jax.vmap(jax.vmap(reference.gaussian_nll_fisher))(f)
            curvature = jnp.where(c[..., None, None] > 0, curvature, 0)
            matrix += jnp.einsum("nt,ntcp,ntcd,ntdq->pq", c, jacobian, curvature, jacobian) / len(f)
        if structure.source == "empirical":
            matrix = columns.T @ columns / len(f)
        return Truth(loss, gradient, matrix)

    return run


def _wide(leaf):
    return leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf


def _coefficients(structure, batch, num_examples, num_positions):
    """How much each position of each example counts, `(n, positions)`; 1 if nothing is said."""
    counts = jnp.ones((num_examples, num_positions), bool)
    if structure.masked:
        counts = counts & batch["mask"].reshape(num_examples, -1)
    weights = batch["weights"] if structure.weighted else jnp.ones(num_examples)
    weights = jnp.where(jnp.any(counts, axis=1), weights, 0)
    mean = jnp.mean(weights)
    coefficients = (weights / jnp.where(mean == 0, 1, mean))[:, None] * counts
    if structure.mean_over_positions:
        positions = jnp.sum(coefficients) / num_examples
        coefficients = coefficients / jnp.where(positions == 0, 1, positions)
    return coefficients

"""The energy of a wavefunction, by variational Monte Carlo."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._math.arguments import array
from .._math.scalars import positive
from .._math.types import PRNGKey
from .base import check_outputs, NaturalLoss, weigh_outputs, Weighting


class EnergyLoss(NaturalLoss):
    r"""$\ell_n = E_n + 2\, e_n \cdot (f_n - f_n^0) + 2\, \lVert f_n - f_n^0 \rVert^2$.

    $f^0$ are the outputs where the loss is taken. So it is, up to what does not depend on f, the negative
    log-likelihood of a normal distribution of variance 1/4 with mean f, and its Hessian is $4 I$. Made by
    [`kfax.energy_loss`][].

    **Fields:**

    - `outputs`: log |ψ|, `(n,)`, or real and imaginary part of log ψ, `(n, 2)`.
    - `reference`: $f^0$, the same, without derivative.
    - `energies`: E, `(n,)`: real parts of the local energies as they were given.
    - `deviations`: e, of the local energies from their mean, clipped, like the outputs.
    - `weighting`: of examples.
    """

    outputs: Float[Array, "n ..."]
    reference: Float[Array, "n ..."]
    energies: Float[Array, " n"]
    deviations: Float[Array, "n ..."]
    weighting: Weighting

    def losses(self) -> Float[Array, " n"]:
        change = self.outputs - self.reference
        terms = 2 * change * (self.deviations + change)
        return self.energies + jnp.sum(terms.reshape(len(terms), -1), axis=1)

    def factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return 2 * vector

    def factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return 2 * vector

    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        # Targets f + ε/2 with standard normal ε: the gradient is 4 (f - target).
        return -2 * jax.random.normal(key, self.outputs.shape, self.outputs.dtype)


def energy_loss(
    log_psi: Array,
    local_energies: ArrayLike,
    *,
    clip: ArrayLike | None = 5.0,
    weights: ArrayLike | None = None,
) -> EnergyLoss:
    r"""The energy of a wavefunction ψ, averaged over configurations drawn from |ψ|².

    The value is the mean of the local energies $E = \hat H \psi / \psi$. The gradient is that of the energy,
    $2\,\mathrm{Re}\,\langle (E - \bar E)^* \, \partial \log \psi \rangle$, in which E itself is not differentiated; and
    the curvature is $4\,\mathrm{Re}\,\langle \partial \log \psi^* \, \partial \log \psi \rangle$. If the mean of
    ∂ log ψ is taken off, as by [`kfax.SampleSpaceCurvature`][]`(centered=True)`, that is the Fisher information of |ψ|²
    for a real ψ, and the Fubini-Study metric, four times the real part of the quantum geometric tensor, for a complex
    one.

    Compute the local energies outside of what is differentiated, of `kfax.untag(model)` if it is tagged, and put them
    into the batch. The value on the same batch does not change with the parameters, so that there is nothing to measure
    a step by: give learning rate and damping by numbers or schedules, with [`kfax.NormConstraint`][], and no
    [`kfax.Rejection`][]. With `micro_batches`, and [`kfax.across`][] devices, the mean $\bar E$ is that of each part.

    **Arguments:**

    - `log_psi`: log |ψ| of a real wavefunction, `(n,)`; or real and imaginary part of log ψ, `(n, 2)`.
    - `local_energies`: `(n,)`, real, or complex for an output with two parts. [loss]
    - `clip`: local energies further from their median than this multiple of their mean absolute deviation from it are
        brought back to there, before their mean is subtracted; real and imaginary parts each. `None` for no clipping.
        It affects the gradient, not the value, and does not regard weights.
    - `weights`: `(n,)`, how much each configuration counts in the mean; only their ratios matter within a batch.

    **Returns:** a [`kfax.EnergyLoss`][], to be returned by `loss_fn`.

    **Raises:** `ValueError` for outputs that are not floating-point, shapes that do not fit, and complex energies of a
    real wavefunction.

    ??? cite "Source"
        Pfau, Spencer, Matthews & Foulkes 2020, arXiv:1909.02487, sections II.C and II.D (clipping by the mean absolute
        deviation). Differs: deviations are from the mean after clipping.
    """
    check_outputs("energy_loss", log_psi)
    if log_psi.shape != log_psi.shape[:1] and log_psi.shape[1:] != (2,):
        raise ValueError(
            "`energy_loss` takes log |ψ| of shape (n,), or real and imaginary part of log ψ, (n, 2), got "
            f"{log_psi.shape}."
        )
    energies = jax.lax.stop_gradient(array("`local_energies` of `energy_loss`", local_energies))
    if energies.shape != log_psi.shape[:1]:
        raise ValueError(
            f"`local_energies` of `energy_loss` must have one number for each example, shape {log_psi.shape[:1]}, got "
            f"{energies.shape}."
        )
    if log_psi.ndim == 1 and jnp.iscomplexobj(energies):
        raise ValueError("Complex local energies need both parts of log ψ, as outputs of shape (n, 2).")
    outputs, weighting = weigh_outputs("energy_loss", log_psi, weights, None, False)
    parts = energies if log_psi.ndim == 1 else jnp.stack([energies.real, energies.imag], axis=1)
    parts = parts.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    deviations = parts if clip is None else _clipped(parts, positive("clip", clip).astype(parts.dtype))
    share = weighting.example_weights(len(parts))
    share = jnp.ones(len(parts), parts.dtype) if share is None else share.astype(parts.dtype)
    deviations -= jnp.tensordot(share, deviations, axes=1) / len(parts)
    return EnergyLoss(
        outputs=outputs,
        reference=jax.lax.stop_gradient(outputs),
        energies=parts if parts.ndim == 1 else parts[:, 0],
        deviations=deviations.astype(outputs.dtype),
        weighting=weighting,
    )


def _clipped(parts: Float[Array, "n ..."], clip: Float[Array, ""]) -> Float[Array, "n ..."]:
    """Brought to within a multiple of the mean absolute deviation from the median."""
    median = jnp.median(parts, axis=0)
    width = clip * jnp.mean(jnp.abs(parts - median), axis=0)
    return jnp.clip(parts, median - width, median + width)

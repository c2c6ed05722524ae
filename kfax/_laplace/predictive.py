"""What a posterior says of outputs: a normal distribution."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math import linalg
from .._math.arguments import single_key
from .._math.types import PRNGKey


class Predictive(eqx.Module):
    """A normal distribution of outputs, made by [`kfax.Laplace`][]`.predict`.

    It is that of what the model computes, without the noise of the targets: for [`kfax.squared_error`][] add the
    variance of the noise, half the temperature, to the variance of each output.

    Its methods are for a single one. After `jax.vmap` over examples, map over it too:
    `jax.vmap(kfax.Predictive.moderated_logits)(predictive)`.

    **Fields:**

    - `mean`: the outputs of the model, `(*outputs)`.
    - `covariance`: of each pair of outputs, `(*outputs, *outputs)`. [output²]
    """

    mean: Float[Array, "..."]
    covariance: Float[Array, "..."]

    def variance(self) -> Float[Array, "..."]:
        """The variance of each output, in the shape of the mean. [output²]

        **Raises:** `ValueError` if mean and covariance have one more axis, of examples.
        """
        return jnp.diagonal(self._matrix()).reshape(self.mean.shape)

    def moderated_logits(self) -> Float[Array, "..."]:
        r"""Logits $f / \sqrt{1 + \pi v / 8}$ of mean f and variance v: less certain, where the posterior is.

        Probabilities are their `jax.nn.softmax` or `jax.nn.sigmoid`. The latter is the mean of the sigmoid over the
        distribution, to within 0.02. Softmax is the usual generalization, which leaves out covariances between classes;
        the mean of the softmax over draws by `sample` has them.

        **Returns:** an array in the shape of the mean.

        **Raises:** `ValueError` if mean and covariance have one more axis, of examples.

        ??? cite "Source"
            MacKay 1992, "The evidence framework applied to classification networks"; for softmax Daxberger et al. 2021,
            arXiv:2106.14806.
        """
        return self.mean / jnp.sqrt(1 + jnp.pi / 8 * self.variance())

    def sample(self, key: PRNGKey) -> Float[Array, "..."]:
        """Draws outputs.

        **Arguments:**

        - `key`: for the draw. Map over several, `jax.vmap(predictive.sample)(jax.random.split(key, 100))`, for as many.

        **Returns:** an array in the shape of the mean.

        **Raises:** `ValueError` if mean and covariance have one more axis, of examples.
        """
        # Of a covariance that may be singular: by eigenvalues, which rounding may have made negative.
        values, vectors = linalg.eigh(self._matrix())
        noise = jax.random.normal(single_key(key), values.shape, values.dtype)
        change = linalg.matmul(vectors, jnp.sqrt(jnp.maximum(values, 0)) * noise)
        return self.mean + change.reshape(self.mean.shape)

    def _matrix(self) -> Float[Array, "d d"]:
        if self.covariance.shape != self.mean.shape * 2:
            raise ValueError(
                f"The mean has the shape {self.mean.shape}, the covariance {self.covariance.shape}: this is of "
                "several examples. Map over them, as in `jax.vmap(kfax.Predictive.variance)(predictive)`."
            )
        return self.covariance.reshape(self.mean.size, self.mean.size)

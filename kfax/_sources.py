"""Which cotangents of the outputs to pull back to the layers: what curvature matrix is estimated, and how."""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._losses import Loss
from ._types import Counter, PRNGKey


Cotangents = tuple[Float[Array, "n ..."], ...]


class CurvatureSource(eqx.Module):
    """The matrix that an estimator estimates, as a set of cotangents of the losses' outputs.

    The sum over the set of the outer products of the cotangents of one example is, exactly or in expectation, the
    Hessian H of its losses in the outputs, which is the Fisher information of the outputs as well.
    """

    @abc.abstractmethod
    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        """How many backward passes it takes."""

    @abc.abstractmethod
    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        """The cotangents of all losses' outputs for one of the passes. Per example: not divided by n."""


class ExactGGN(CurvatureSource):
    r"""The generalized Gauss-Newton matrix exactly: every column of S, where $H = S S^\top$.

    One backward pass for each entry of an example's outputs (classes times positions), in a loop that is compiled
    once. Deterministic, needs no key. For the losses of kfax it is the exact Fisher information matrix as well.

    ??? cite "Source"
        Martens 2020, arXiv:1412.1193, sections 8 and 9.
    """

    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        return sum(math.prod(loss.outputs.shape[1:]) for loss in losses)

    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        del key
        result, offset = [], 0
        for loss in losses:
            shape = loss.outputs.shape
            size = math.prod(shape[1:])
            # Zeros while it is another loss's turn.
            basis = jax.nn.one_hot(index - offset, size, dtype=loss.outputs.dtype)
            result.append(loss.multiply_factor(jnp.broadcast_to(basis.reshape(shape[1:]), shape)))
            offset += size
        return tuple(result)


class SampledFisher(CurvatureSource):
    """The Fisher information matrix, estimated by gradients for targets drawn from the model's own distribution.

    Unbiased, one backward pass for each sample. Needs a key. Not the empirical Fisher: the given targets play no part.

    ??? cite "Source"
        Martens & Grosse 2015, arXiv:1503.05671, section 5.
    """

    num_samples: int = eqx.field(static=True)

    def __init__(self, num_samples: int = 1):
        """**Arguments:**

        - `num_samples`: how many targets to draw for each example.
        """
        self.num_samples = _check_samples(num_samples)

    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        del losses
        return self.num_samples

    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        scale = 1 / math.sqrt(self.num_samples)
        keys = _split(key, index, len(losses))
        return tuple(scale * loss.sampled_cotangent(k) for loss, k in zip(losses, keys, strict=True))


class CurvaturePropagation(CurvatureSource):
    r"""The generalized Gauss-Newton matrix, estimated by $S \varepsilon$ with random signs ε.

    Unbiased, one backward pass for each sample. Needs a key. Its variance is at most that of `SampledFisher` for
    normal distributions, and it needs no sampling from the model.

    ??? cite "Source"
        Martens, Sutskever & Swersky 2012, arXiv:1206.6464, section 3.
    """

    num_samples: int = eqx.field(static=True)

    def __init__(self, num_samples: int = 1):
        """**Arguments:**

        - `num_samples`: how many vectors of signs to draw.
        """
        self.num_samples = _check_samples(num_samples)

    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        del losses
        return self.num_samples

    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        scale = 1 / math.sqrt(self.num_samples)

        def one(loss, key):
            return scale * loss.multiply_factor(jax.random.rademacher(key, loss.outputs.shape, loss.outputs.dtype))

        return tuple(one(loss, k) for loss, k in zip(losses, _split(key, index, len(losses)), strict=True))


def _check_samples(num_samples: int) -> int:
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    return num_samples


def _split(key: PRNGKey | None, index: Counter, number: int) -> Array:
    if key is None:
        raise ValueError(
            "This curvature source draws random numbers: pass `key=jax.random.key(...)`, a new one at each step, or "
            "use `kfax.ExactGGN()`."
        )
    return jax.random.split(jax.random.fold_in(key, index), number)

"""Which cotangents of the outputs to pull back to the layers: what curvature matrix is estimated, and how."""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._capture import Cotangents
from .._losses import Loss
from .._math.arguments import whole_number
from .._math.types import Counter, PRNGKey


class CurvatureSource(eqx.Module):
    r"""The matrix that an estimator estimates, by a factor of it in the outputs.

    $M_n = Q_n Q_n^\top$ is, exactly or in expectation, the Hessian of the losses of one example in their outputs, or
    the Fisher information of these, or another such matrix. The outputs of all losses are one vector here. Q has K
    columns, the cotangents to be pulled back. All is per example, not divided by n, and has the losses' weights in it.
    Where examples may see each other, the columns of different examples have to be uncorrelated.

    A random source draws the same Q for the same key, in all methods. To define a source subclass
    [`kfax.CotangentSource`][], which needs the columns only.
    """

    @abc.abstractmethod
    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        """K: how many backward passes it takes."""

    @abc.abstractmethod
    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        """One column of Q for each example: the cotangents of all losses' outputs for one of the passes."""

    @abc.abstractmethod
    def multiply_factor(self, losses: tuple[Loss, ...], vector: Float[Array, "n k"], key: PRNGKey | None) -> Cotangents:
        """`Q v`."""

    @abc.abstractmethod
    def multiply_factor_transpose(
        self, losses: tuple[Loss, ...], vectors: Cotangents, key: PRNGKey | None
    ) -> Float[Array, "n k"]:
        """`Qᵀ u`."""

    @abc.abstractmethod
    def multiply(self, losses: tuple[Loss, ...], vectors: Cotangents, key: PRNGKey | None) -> Cotangents:
        """`Q Qᵀ u`."""


class CotangentSource(CurvatureSource):
    """A source that is defined by its cotangents: subclasses say how many, and what each of them is."""

    def multiply_factor(self, losses: tuple[Loss, ...], vector: Float[Array, "n k"], key: PRNGKey | None) -> Cotangents:
        def add(total, step):
            index, coefficient = step
            return _add_multiple(total, coefficient, self.cotangents(losses, index, key)), None

        return _as_outputs(losses, jax.lax.scan(add, _zeros(losses), (self._indices(losses), vector.T))[0])

    def multiply_factor_transpose(
        self, losses: tuple[Loss, ...], vectors: Cotangents, key: PRNGKey | None
    ) -> Float[Array, "n k"]:
        def project(index):
            return _dot(self.cotangents(losses, index, key), vectors)

        return jax.lax.map(project, self._indices(losses)).T

    def multiply(self, losses: tuple[Loss, ...], vectors: Cotangents, key: PRNGKey | None) -> Cotangents:
        def add(total, index):
            column = self.cotangents(losses, index, key)
            return _add_multiple(total, _dot(column, vectors), column), None

        return _as_outputs(losses, jax.lax.scan(add, _zeros(losses), self._indices(losses))[0])

    def _indices(self, losses):
        return jnp.arange(self.num_cotangents(losses))


class ExactSource(CurvatureSource):
    """A source whose Q is block diagonal over the losses, each block a factor that the loss knows."""

    @abc.abstractmethod
    def factor(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """The unweighted factor of one loss times a vector."""

    @abc.abstractmethod
    def factor_transpose(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """The transpose of that."""

    @abc.abstractmethod
    def product(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """The unweighted matrix of one loss times a vector."""

    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        return max(columns.stop for columns in _columns(losses))

    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        dtype = jnp.result_type(*(loss.outputs for loss in losses))
        basis = jax.nn.one_hot(index, self.num_cotangents(losses), dtype=dtype)
        return self.multiply_factor(losses, jnp.broadcast_to(basis, (losses[0].num_examples, basis.size)), key)

    def multiply_factor(self, losses: tuple[Loss, ...], vector: Float[Array, "n k"], key: PRNGKey | None) -> Cotangents:
        del key
        results = []
        for loss, columns in zip(losses, _columns(losses), strict=True):
            part = vector[:, columns].reshape(loss.outputs.shape).astype(loss.outputs.dtype)
            results.append(loss.weigh(self.factor(loss, part)))
        return tuple(results)

    def multiply_factor_transpose(
        self, losses: tuple[Loss, ...], vectors: Cotangents, key: PRNGKey | None
    ) -> Float[Array, "n k"]:
        del key
        rows: dict[range, list[Array]] = {}
        for loss, vector in zip(losses, vectors, strict=True):
            result = self.factor_transpose(loss, loss.weigh(vector))
            rows.setdefault(loss.examples, []).append(result.reshape(len(result), -1))
        width = self.num_cotangents(losses)
        of_sets = [jnp.concatenate(each, axis=1) for each in rows.values()]
        of_sets = [jnp.pad(each, [(0, 0), (0, width - each.shape[1])]) for each in of_sets]
        return sum(of_sets[1:], of_sets[0])

    def multiply(self, losses: tuple[Loss, ...], vectors: Cotangents, key: PRNGKey | None) -> Cotangents:
        del key
        pairs = zip(losses, vectors, strict=True)
        return tuple(loss.weigh(self.product(loss, loss.weigh(vector))) for loss, vector in pairs)


class ExactGGN(ExactSource):
    r"""The generalized Gauss-Newton matrix exactly: the factor S of the losses' Hessian $H = S S^\top$.

    One backward pass for each entry of an example's outputs (classes times positions), in a loop that is compiled
    once. Deterministic, needs no key. For a [`kfax.NaturalLoss`][] it is the exact Fisher information matrix as well.

    ??? cite "Source"
        Martens 2020, arXiv:1412.1193, sections 8 and 9.
    """

    def factor(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return loss.ggn_factor(vector)

    def factor_transpose(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return loss.ggn_factor_transpose(vector)

    def product(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return loss.ggn_product(vector)


class ExactFisher(ExactSource):
    """The Fisher information matrix exactly, for losses that know it in closed form.

    One backward pass for each entry of an example's outputs, as for [`kfax.ExactGGN`][], from which it differs for
    losses whose outputs are not natural parameters. Deterministic, needs no key.

    ??? cite "Source"
        Martens 2020, arXiv:1412.1193, section 5.
    """

    def factor(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return loss.fisher_factor(vector)

    def factor_transpose(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return loss.fisher_factor_transpose(vector)

    def product(self, loss: Loss, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return loss.fisher_factor(loss.fisher_factor_transpose(vector))


class SampledFisher(CotangentSource):
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
        self.num_samples = whole_number("num_samples", num_samples)

    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        del losses
        return self.num_samples

    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        scale = 1 / math.sqrt(self.num_samples)
        keys = _split(key, index, len(losses))
        return tuple(scale * loss.weigh(loss.sampled_gradient(k)) for loss, k in zip(losses, keys, strict=True))


class CurvaturePropagation(CotangentSource):
    r"""An estimate of another source's matrix $Q Q^\top$ by $Q \varepsilon$ with random signs ε.

    Unbiased, one backward pass for each sample. Needs a key. For normal distributions its variance is at most that of
    `SampledFisher`, and it needs no sampling from the model.

    ??? cite "Source"
        Martens, Sutskever & Swersky 2012, arXiv:1206.6464, section 3.
    """

    num_samples: int = eqx.field(static=True)
    source: CurvatureSource

    def __init__(self, num_samples: int = 1, *, source: CurvatureSource = ExactGGN()):
        """**Arguments:**

        - `num_samples`: how many vectors of signs to draw.
        - `source`: whose matrix to estimate: [`kfax.ExactGGN`][] or [`kfax.ExactFisher`][].

        **Raises:** `ValueError` for something else than a source.
        """
        if not isinstance(source, CurvatureSource):
            raise ValueError(f"`source` must be a curvature source, such as `kfax.ExactGGN()`, got {source!r}.")
        self.num_samples = whole_number("num_samples", num_samples)
        self.source = source

    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        del losses
        return self.num_samples

    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        signs_key, source_key = _split(key, index, 2)
        shape = (losses[0].num_examples, self.source.num_cotangents(losses))
        signs = jax.random.rademacher(signs_key, shape, jnp.result_type(*(loss.outputs for loss in losses)))
        return self.source.multiply_factor(losses, signs / math.sqrt(self.num_samples), source_key)


class EmpiricalFisher(CotangentSource):
    r"""The second moment of the examples' gradients for the given targets, $\frac1N \sum_n \nabla h_n \nabla h_n^\top$.

    $\nabla h_n$ is the gradient of all losses of example n together, not divided by N: unlike in the other sources,
    there are products of different losses. Weights of examples, divided by their mean, multiply the
    terms of the sum, and so does what multiplies a loss: that of $c \ell$ is c times that of ℓ, and averaging over R
    positions divides by R, not by R². The gradient of a [`kfax.Penalty`][] is not in it.

    One backward pass. Deterministic, needs no key. It is no estimate of the Fisher information or of the GGN: it
    vanishes where every example is fitted, however curved the loss is there.

    ??? cite "Source"
        Kunstner, Balles & Hennig 2019, arXiv:1905.12558, on what it is not.
    """

    def num_cotangents(self, losses: tuple[Loss, ...]) -> int:
        del losses
        return 1

    def cotangents(self, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
        del index, key
        return tuple(loss.weigh(loss.gradient()) for loss in losses)


def _columns(losses: tuple[Loss, ...]) -> list[slice]:
    """Which columns of Q belong to each loss. Losses of different examples share columns."""
    ends, found = {}, []
    for loss in losses:
        start = ends.get(loss.examples, 0)
        ends[loss.examples] = start + math.prod(loss.outputs.shape[1:])
        found.append(slice(start, ends[loss.examples]))
    return found


def column(source: CurvatureSource, losses: tuple[Loss, ...], index: Counter, key: PRNGKey | None) -> Cotangents:
    """A source's cotangents for one pass, such that those of different examples are uncorrelated.

    One pass pulls back the outputs of all examples. Where examples see each other, what comes from different ones adds
    up in the cotangents of a layer. A random sign for each example removes it from their second moment, on average;
    where they do not, nothing changes. A source that draws random numbers has no need of signs.
    """
    vectors = source.cotangents(losses, index, key)
    if not _is_deterministic(source):
        return vectors
    key = jax.random.fold_in(jax.random.key(0) if key is None else key, index)
    signs = jax.random.rademacher(key, (len(vectors[0]),), vectors[0].dtype)
    return tuple(vector * signs.reshape(-1, *(1,) * (vector.ndim - 1)).astype(vector.dtype) for vector in vectors)


def _is_deterministic(source: CurvatureSource) -> bool:
    return isinstance(source, ExactGGN | ExactFisher | EmpiricalFisher)


def check_deterministic(name: str, source: CurvatureSource) -> CurvatureSource:
    if not _is_deterministic(source):
        raise ValueError(
            f"`{name}` of a quadratic model must be `kfax.ExactGGN()`, `kfax.ExactFisher()` or "
            f"`kfax.EmpiricalFisher()`, got {source!r}."
        )
    return source


def _zeros(losses: tuple[Loss, ...]) -> Cotangents:
    """Zeros like the outputs, to add up in: in at least float32."""
    return tuple(jnp.zeros_like(x.outputs, jnp.promote_types(x.outputs.dtype, jnp.float32)) for x in losses)


def _as_outputs(losses: tuple[Loss, ...], totals: Cotangents) -> Cotangents:
    return tuple(total.astype(loss.outputs.dtype) for loss, total in zip(losses, totals, strict=True))


def _add_multiple(totals: Cotangents, coefficient: Float[Array, " n"], vectors: Cotangents) -> Cotangents:
    """Adds a multiple of vectors, another one for each example."""

    def add(total, vector):
        return (total + coefficient.reshape(-1, *(1,) * (total.ndim - 1)) * vector).astype(total.dtype)

    return tuple(add(total, vector) for total, vector in zip(totals, vectors, strict=True))


def _dot(left: Cotangents, right: Cotangents) -> Float[Array, " n"]:
    """The inner product for each example, in at least float32."""
    pairs = zip(left, right, strict=True)
    dtype = jnp.result_type(jnp.float32, *left, *right)
    return jnp.stack([jnp.sum((x * y).reshape(len(x), -1), axis=1, dtype=dtype) for x, y in pairs]).sum(0)


def _split(key: PRNGKey | None, index: Counter, number: int) -> list[PRNGKey]:
    if key is None:
        raise ValueError(
            "This curvature source draws random numbers: pass `key=jax.random.key(...)`, a new one at each step, or "
            "use `kfax.ExactGGN()`."
        )
    return [jax.random.fold_in(key, index * number + i) for i in range(number)]

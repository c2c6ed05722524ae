"""Any loss, with its derivatives in the outputs by automatic differentiation."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._math.arguments import function as function_of, whole_number
from .._math.linalg import eigh, matmul
from .._math.types import ArrayTree, PRNGKey, PyTree
from .base import check_outputs, expand, Loss, make_weighting, Weighting


class _Closure(eqx.Module):
    """A function that can be taken out of where it was defined: the arrays it closes over are its leaves."""

    arrays: ArrayTree
    rest: Any = eqx.field(static=True)

    def __init__(self, function: Callable, *args: Any):
        converted = eqx.filter_closure_convert(function, *args)
        arrays, self.rest = eqx.partition(converted, eqx.is_array_like)
        self.arrays = jax.tree.map(jnp.asarray, arrays)

    def __call__(self, *args: Any) -> Any:
        return eqx.combine(self.arrays, self.rest)(*args)


class FunctionLoss(Loss):
    r"""$\ell = $ any function of the outputs at one place: of one example, at one position.

    Made by [`kfax.function_loss`][]. Its Hessian is taken by automatic differentiation and diagonalized,
    $U \Lambda U^\top$. Negative curvature, if there is any, is left out: $H = S S^\top$ with
    $S = U \sqrt{\max(\Lambda, 0)}$. Of more than `max_dim` outputs there is no S, but `ggn_product` multiplies by the
    Hessian as it is, forward over reverse: such a loss has to be convex. The Fisher information is not known in
    closed form.

    **Fields:**

    - `outputs`: `(n, *positions, *event)`.
    - `data`: what else the function takes, each array of shape `(n, *positions, ...)`.
    - `weighting`: of examples and positions.
    - `function`: from the outputs and the data at one place to a scalar.
    - `sample`: from a key and the outputs at one place to data, or `None`.
    - `event_ndim`: how many of the outputs' axes are the function's.
    - `max_dim`: the largest number of outputs of one place for which H is made.
    """

    outputs: Float[Array, "n ..."]
    data: tuple[ArrayTree, ...]
    weighting: Weighting
    function: _Closure
    sample: _Closure | None
    event_ndim: int = eqx.field(static=True)
    max_dim: int = eqx.field(static=True)

    def losses(self) -> Float[Array, "n ..."]:
        outputs = _wide(self.outputs)
        return self._map(self.function, outputs, *self.data).astype(outputs.dtype)

    def ggn_factor(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        scales, directions = self._eigen()
        product = matmul(directions, (scales * self._columns(vector))[..., None])[..., 0]
        return product.reshape(vector.shape).astype(vector.dtype)

    def ggn_factor_transpose(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        scales, directions = self._eigen()
        product = scales * matmul(jnp.swapaxes(directions, -1, -2), self._columns(vector)[..., None])[..., 0]
        return product.reshape(vector.shape).astype(vector.dtype)

    def ggn_product(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        if self._event_size <= self.max_dim:
            return self.ggn_factor(self.ggn_factor_transpose(vector))

        def product(f, u, *data):
            return jax.jvp(lambda f: jax.grad(self.function)(f, *data), (f,), (u,))[1]

        return self._map(product, _wide(self.outputs), _wide(vector), *self.data).astype(vector.dtype)

    def fisher_factor(self, vector: Float[Array, "n ..."]) -> NoReturn:
        raise self._no_fisher()

    def fisher_factor_transpose(self, vector: Float[Array, "n ..."]) -> NoReturn:
        raise self._no_fisher()

    def sampled_gradient(self, key: PRNGKey) -> Float[Array, "n ..."]:
        if self.sample is None:
            raise ValueError(
                "This `function_loss` cannot draw targets: give it `sample=`, a function `(key, outputs) -> data` that "
                "draws them from the model's distribution at one place. Without one, use `kfax.ExactGGN()`, "
                "`kfax.CurvaturePropagation()` or `kfax.EmpiricalFisher()` as the source of curvature."
            )
        bits = jax.random.bits(key, (*self._places, 2), "uint32")
        keys = jax.random.wrap_key_data(bits, impl="threefry2x32")
        outputs = _wide(self.outputs)
        data = jax.lax.stop_gradient(self._map(self.sample, keys, outputs))
        return self._map(jax.grad(self.function), outputs, *data).astype(self.outputs.dtype)

    @property
    def _places(self) -> tuple[int, ...]:
        return self.outputs.shape[: self.outputs.ndim - self.event_ndim]

    @property
    def _event_size(self) -> int:
        return math.prod(self.outputs.shape[len(self._places) :])

    def _map(self, function: Callable, *args: ArrayTree) -> Any:
        """Applies a function of one place to all places, with zeros as the results of those that are masked."""
        for _ in self._places:
            function = jax.vmap(function)
        results, mask = function(*args), self.weighting.mask
        if mask is None:
            return results
        return jax.tree.map(lambda x: jnp.where(expand(mask, x), x, jnp.zeros_like(x)), results)

    def _eigen(self) -> tuple[Float[Array, "... e"], Float[Array, "... e e"]]:
        """The roots of the eigenvalues of H, or zero, and the eigenvectors, for each place."""
        event, size = self.outputs.shape[len(self._places) :], self._event_size
        if size > self.max_dim:
            raise ValueError(
                f"To factor its Hessian, this `function_loss` would have to diagonalize a matrix of size {size} for "
                f"each example and position, more than `max_dim={self.max_dim}`. Raise `max_dim`; or, if the loss is a "
                "sum over axes of the outputs, declare them positions by a smaller `event_ndim`; or use a source of "
                "curvature that needs no factor: `kfax.EmpiricalFisher()`, or `kfax.SampledFisher()` with `sample=`. "
                "Products with the exact curvature (`kfax.ImplicitExactCurvature`) have no such limit."
            )

        def hessian(flat, *data):
            return jax.hessian(lambda v: self.function(v.reshape(event), *data))(flat)

        matrix = self._map(hessian, self._columns(self.outputs), *self.data)
        values, vectors = eigh(matrix)
        return jnp.sqrt(jnp.maximum(values, 0)), vectors

    def _columns(self, array: Float[Array, "n ..."]) -> Float[Array, "n ... e"]:
        """With the axes of the event made one."""
        return _wide(array).reshape(*self._places, -1)

    def _no_fisher(self) -> ValueError:
        remedy = "`kfax.ExactGGN()`" if self.sample is None else "`kfax.SampledFisher()`, which draws from `sample`,"
        return ValueError(
            f"The Fisher information of a `function_loss` is not known in closed form. Use {remedy} as the source of "
            "curvature."
        )


def function_loss(
    function: Callable,
    outputs: Array,
    *data: ArrayTree,
    event_ndim: int = 1,
    sample: Callable | None = None,
    max_dim: int = 256,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    mean_over_positions: bool = False,
) -> FunctionLoss:
    """Any loss, averaged over the examples of a batch, its curvature in the outputs by automatic differentiation.

    For a loss that is a sum over single outputs, `event_ndim=0` is fastest: it needs second derivatives only. Negative
    curvature is left out of the matrix, and a loss that is piecewise linear in the outputs has none at all: smooth it.

    **Arguments:**

    - `function`: `(f, *data) -> ℓ`, a scalar, twice differentiable in f: the outputs of one example at one position.
        It may close over anything, parameters of the model included.
    - `outputs`: `(n, *positions, *event)`, with the examples on axis 0. Losses of different positions of one example
        are summed.
    - `data`: what else the function takes, such as targets: arrays `(n, *positions, ...)`, or PyTrees of such.
    - `event_ndim`: how many of the last axes of the outputs f has; those between them and axis 0 are positions.
    - `sample`: `(key, f) -> data`, draws the data of one place from the distribution of which ℓ is the negative
        log-likelihood; a tuple if there are several. Only needed for [`kfax.SampledFisher`][].
    - `max_dim`: the largest size of f for which the Hessian is made and diagonalized. That takes time with its third
        power, for every example and position.
    - `weights`: `(n,)`, how much each example counts in the mean; only their ratios matter within a batch.
    - `mask`: boolean, `(n, *positions)` or `(n,)`: True for what counts. A masked position adds nothing, an example
        that is masked throughout is not counted. What stands in masked outputs and data has no effect: the function
        is called with those of another position.
    - `mean_over_positions`: average over positions instead of summing, each counting the same.

    **Returns:** a [`kfax.FunctionLoss`][], to be returned by `loss_fn`.

    **Raises:** `ValueError` for outputs that are not floating-point, for shapes that do not fit, and if `function` does
    not return a scalar.
    """
    check_outputs("function_loss", outputs)
    function_of("function", function, "lambda f, y: jnp.sum((f - y) ** 2)", 1 + len(data))
    if sample is not None:
        function_of("sample", sample, "lambda key, f: f + jax.random.normal(key, f.shape)", 2)
    whole_number("max_dim", max_dim, 0)
    if whole_number("event_ndim", event_ndim, 0) >= outputs.ndim:
        raise ValueError(
            f"With `event_ndim={event_ndim}` `function_loss` takes outputs with {event_ndim} axes after that of the "
            f"examples, got {outputs.shape}. If each example has a single output use `event_ndim=0`."
        )
    places = outputs.shape[: outputs.ndim - event_ndim]
    data = jax.tree.map(jnp.asarray, data)
    for leaf in jax.tree.leaves(data):
        if leaf.shape[: len(places)] != places:
            raise ValueError(
                f"Each array of `data` of `function_loss` must lead with the axes of examples and positions, {places}, "
                f"got one of shape {leaf.shape}."
            )
    weighting = make_weighting("function_loss", outputs, places, weights, mask, mean_over_positions)
    outputs, data = jax.tree.map(lambda x: _replace(x, weighting), (outputs, data))
    f, *one = jax.eval_shape(lambda: _one_place(len(places), (_wide(outputs), *data)))
    try:
        loss = eqx.filter_eval_shape(function, f, *one)
    except Exception as error:
        error.add_note(
            f"`function` of `kfax.function_loss` is called for one place, here with outputs of shape {f.shape}."
        )
        raise
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"`function` of `function_loss` must return a real number for outputs of shape {f.shape}, those of one "
            f"example at one position, but it returned {loss}. Which axes are whose is said by `event_ndim`."
        )
    return FunctionLoss(
        outputs=outputs,
        data=data,
        weighting=weighting,
        function=_Closure(function, f, *one),
        sample=None if sample is None else _sampler(sample, f, tuple(one)),
        event_ndim=event_ndim,
        max_dim=max_dim,
    )


def _replace(array: Array, weighting: Weighting) -> Array:
    """What stands at another place, instead of what is masked: there the function is defined, and zero need not be."""
    mask = weighting.mask
    if mask is None:
        return array
    # The first place that counts, by sums: indexing could not be done where the examples are sharded.
    order = jnp.arange(mask.size).reshape(mask.shape)
    is_first = mask & (order == jnp.min(jnp.where(mask, order, mask.size)))
    first = jnp.sum(jnp.where(expand(is_first, array), array, 0), axis=tuple(range(mask.ndim)), dtype=array.dtype)
    return jnp.where(expand(mask, array), array, jax.lax.stop_gradient(first))


def _one_place(ndim: int, arrays: ArrayTree) -> ArrayTree:
    """Something of the shape of what stands at one place. Unlike slices, maxima can be taken of what is sharded."""
    return jax.tree.map(lambda x: jnp.max(x, axis=tuple(range(ndim))), arrays)


def _wide(array: Float[Array, "..."]) -> Float[Array, "..."]:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _sampler(sample: Callable, f: jax.ShapeDtypeStruct, data: tuple[PyTree, ...]) -> _Closure:
    """`sample`, made to return a tuple of what `data` has, and checked to."""

    def draw(key, f):
        drawn = sample(key, f)
        drawn = drawn if isinstance(drawn, tuple) else (drawn,)
        found, expected = jax.tree.map(jnp.shape, drawn), jax.tree.map(lambda x: x.shape, data)
        if found != expected:
            raise ValueError(
                f"`sample` of `function_loss` must return what `function` takes after the outputs of one place: data "
                f"of shapes {expected}, but it returned {found}."
            )
        return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), drawn, data)

    return _Closure(draw, jax.random.key(0, impl="threefry2x32"), f)

"""The one convention for a user's `loss_fn`, and what comes out of calling it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._losses import Loss, of_all_examples, Penalty
from .._math.arguments import loss_function, single_key
from .._math.types import Model, PRNGKey, Scalar
from .across import own_key


class Evaluation(eqx.Module):
    """What `loss_fn` returned.

    **Fields:**

    - `losses`: one or more losses of the same examples. If they were of different ones, all are now losses of all, in
        which those of others have weight zero.
    - `penalty`: the sum of the terms without curvature, in at least float32.
    - `model_state`: the new state, or `None` if `loss_fn` takes none.
    - `aux`: whatever else it returned.
    """

    losses: tuple[Loss, ...]
    penalty: Scalar
    model_state: Any
    aux: Any

    @property
    def num_examples(self) -> int:
        return self.losses[0].num_examples

    def value(self) -> Scalar:
        """The sum of all losses and penalties, in at least float32."""
        return sum((loss.value() for loss in self.losses), self.penalty)


def split_key(loss_fn: Callable, key: Any) -> tuple[PRNGKey | None, PRNGKey | None]:
    """A key for `loss_fn` and one for the curvature's source, of the one that a user gave, if any.

    They are the same if `loss_fn` takes none: a problem always has a key that is mapped as that of its source is, to
    which the slots are tied.
    """
    loss_function(loss_fn)
    if key is None:
        return None, None
    key = own_key(loss_fn, single_key(key))
    if "key" not in inspect.signature(loss_fn).parameters:
        return key, key
    loss_key, source_key = jax.random.split(key)
    return loss_key, source_key


def evaluate(
    loss_fn: Callable, model: Model, batch: Any, *, key: PRNGKey | None = None, model_state: Any = None
) -> Evaluation:
    """Calls `loss_fn(model, batch)`, with `key` and `model_state` if it has parameters of these names.

    It must return a [`kfax.Loss`][], or a list or dictionary of losses, of the same examples or of different ones,
    among which may be penalties ([`kfax.Penalty`][]), or a tuple of that and more: `(losses, aux)`; or, if it takes a
    `model_state`, `(losses, model_state)` or `(losses, model_state, aux)`.
    """
    names = inspect.signature(loss_function(loss_fn)).parameters
    _check_parameters(names)
    arguments = {}
    if "key" in names:
        if key is not None:
            arguments["key"] = key
        elif names["key"].default is inspect.Parameter.empty:
            raise ValueError("`loss_fn` takes a `key`, but none was given: pass `key=jax.random.key(...)`.")
    takes_state = "model_state" in names
    if takes_state:
        if model_state is None and names["model_state"].default is inspect.Parameter.empty:
            raise ValueError("`loss_fn` takes a `model_state`, but none was given: pass `model_state=...`.")
        # A new object, since Equinox lets each `State` be updated only once, and `loss_fn` may be run several times.
        arguments["model_state"] = jax.tree.map(lambda leaf: leaf, model_state)
    elif model_state is not None:
        raise ValueError(
            "A `model_state` was given, but `loss_fn` has no parameter of this name. Write it as "
            "`loss_fn(model, batch, model_state)` and return `(losses, model_state)`."
        )
    result = loss_fn(model, batch, **arguments)
    extra: tuple[Any, ...] = result[1:] if isinstance(result, tuple) else ()
    losses = result[0] if isinstance(result, tuple) and result else result
    smallest, largest = (1, 2) if takes_state else (0, 1)
    if not smallest <= len(extra) <= largest or _is_losses(extra):
        expected = "(losses, model_state) or (losses, model_state, aux)" if takes_state else "losses or (losses, aux)"
        raise ValueError(
            f"`loss_fn` must return {expected}, but it returned {_describe(result)}. Several losses go in a list, "
            "`[loss_1, loss_2]`."
        )
    state = extra[0] if takes_state else None
    aux = extra[-1] if len(extra) == largest else None
    losses, penalty = _split(losses)
    return Evaluation(losses, penalty, state, aux)


def value(returned: Any) -> Scalar:
    """The number of what a `loss_fn` returns: the sum of all losses and penalties, without L2.

    To be printed, or differentiated as any other function: `eqx.filter_grad(lambda m: kfax.value(loss_fn(m, batch)))`.

    **Arguments:**

    - `returned`: a [`kfax.Loss`][] or a [`kfax.Penalty`][], a list or dictionary of them, or a tuple of that and what
        else `loss_fn` returns, which is not looked at.

    **Returns:** a scalar in at least float32. [loss]

    **Raises:** `ValueError` for anything else.
    """
    is_tuple = isinstance(returned, tuple)
    losses = returned[0] if is_tuple and returned else returned
    if not _is_losses(losses) or (is_tuple and _is_losses(returned[1:])):
        raise ValueError(
            "`kfax.value` takes what a `loss_fn` returns, such as `kfax.softmax_cross_entropy(logits, labels)`, a list "
            f"of several losses, or `(losses, aux)`, but it was given {_describe(returned)}."
        )
    return sum((term.value() for term in _terms(losses)), jnp.zeros((), jnp.float32))


def _check_parameters(names: Mapping[str, inspect.Parameter]) -> None:
    """Beside model and batch nothing is passed but what is asked for by these names."""
    empty, named = inspect.Parameter.empty, (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [name for name, p in list(names.items())[2:] if p.kind in named and p.default is empty]
    unknown = [f"`{name}`" for name in needed if name not in ("key", "model_state")]
    if unknown:
        raise ValueError(
            f"`loss_fn` has a parameter {', '.join(unknown)}, which kfax does not know: beside model and batch it may "
            "take `key` and `model_state`, by these names. Anything else goes into the batch, or has a default."
        )


def _terms(x: Any) -> list[Any]:
    return jax.tree.leaves(x, is_leaf=lambda node: isinstance(node, Loss | Penalty))


def _is_losses(x: Any) -> bool:
    terms = _terms(x)
    return bool(terms) and all(isinstance(term, Loss | Penalty) for term in terms)


def _split(x: Any) -> tuple[tuple[Loss, ...], Scalar]:
    """The losses, and the sum of the penalties."""
    if not _is_losses(x):
        wrong = [term for term in _terms(x) if not isinstance(term, Loss | Penalty)]
        if len(wrong) < len(_terms(x)):
            raise ValueError(
                f"Among the losses that `loss_fn` returned there is {_describe(wrong[0])}. Terms without curvature go "
                "with them as `kfax.Penalty(value)`; all else is returned apart, as in `(losses, aux)`."
            )
        raise ValueError(
            f"`loss_fn` must return a kfax Loss, but it returned {_describe(x)}. Return the object that "
            "`kfax.softmax_cross_entropy(logits, labels)`, `kfax.sigmoid_cross_entropy` or `kfax.squared_error` makes, "
            "for the whole batch: kfax needs the outputs, not only the loss's value. Any other loss of the outputs is "
            "made by `kfax.function_loss`."
        )
    terms = _terms(x)
    losses = tuple(term for term in terms if isinstance(term, Loss))
    if not losses:
        raise ValueError(
            "`loss_fn` returned penalties only, which have no curvature. Return at least one kfax Loss, such as "
            "`kfax.softmax_cross_entropy(logits, labels)`, next to them."
        )
    for loss in losses:
        if jnp.ndim(loss.outputs) == 0:
            raise ValueError("A loss was made inside `jax.vmap`. Make it outside, of the outputs of the whole batch.")
    if any(loss.num_examples == 0 for loss in losses):
        raise ValueError("The batch is empty: a loss has no example on axis 0 of its outputs.")
    dtype = jnp.result_type(jnp.float32, *(loss.outputs for loss in losses))
    penalties = (term.value() for term in terms if isinstance(term, Penalty))
    return of_all_examples(losses), sum(penalties, jnp.zeros((), dtype))


def _describe(x: Any) -> str:
    if eqx.is_array(x):
        return f"an array of dtype {x.dtype} and shape {x.shape}"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}: {', '.join(type(item).__name__ for item in x)}"
    return f"a {type(x).__name__}"

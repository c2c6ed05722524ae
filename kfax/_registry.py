"""Which tagged layer a module becomes, and tagging a whole model."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from ._layers import is_tagged, tagged_layers, TaggedLayer, TaggedLinear
from ._types import Model, Parameters, Where


Rule = Callable[[Any], TaggedLayer]


class Registry:
    """Rules that make tagged layers of modules, by exact module type. Immutable: `register` returns a new one.

    A subclass of a registered type is not covered by its rule, since it may compute something else.
    """

    rules: Mapping[type, Rule]

    def __init__(self, rules: Mapping[type, Rule] | None = None):
        """**Arguments:**

        - `rules`: from the type of a module to a function that wraps a module of this type in a tagged layer.
        """
        self.rules = types.MappingProxyType(dict(rules or {}))

    def register(self, module_type: type, rule: Rule) -> "Registry":
        """A registry with one more rule, or one replaced.

        **Arguments:**

        - `module_type`: a class of modules.
        - `rule`: wraps a module of that class in a tagged layer, for instance
            `lambda linear: kfax.TaggedLinear(linear, block=kfax.KroneckerFactored(kfax.Reduce()))`.

        **Raises:** `ValueError` if `module_type` is not a class.
        """
        if not isinstance(module_type, type):
            raise ValueError(
                f"`register` takes the class of a module, such as `eqx.nn.Linear`, got {module_type!r}. To tag one "
                "particular layer differently, wrap it yourself, as in `kfax.TaggedLinear(layer, block=...)`."
            )
        return Registry({**self.rules, module_type: rule})

    def apply(self, module: Any) -> TaggedLayer:
        """Wraps one module by the rule for its type.

        **Raises:** `ValueError` if there is no such rule, or if it does not return a tagged layer.
        """
        name = type(module).__name__
        if type(module) not in self.rules:
            raise ValueError(
                f"The registry has no rule for `{name}`. Add one with `registry.register({name}, rule)`, where "
                "`rule(module)` returns a `kfax.TaggedLayer`. It has rules for: "
                f"{', '.join(sorted(t.__name__ for t in self.rules)) or 'nothing'}."
            )
        layer = self.rules[type(module)](module)
        if not is_tagged(layer):
            raise ValueError(
                f"The rule registered for `{name}` must return a `kfax.TaggedLayer`, such as "
                f"`kfax.TaggedLinear(module)`, but it returned {type(layer).__name__}."
            )
        return layer


default_registry = Registry({eqx.nn.Linear: TaggedLinear})


def tag(model: Model, *, registry: Registry = default_registry, frozen: Where | None = None) -> Model:
    """Wraps every layer of a model in the tagged layer that the registry has for it.

    The outermost module with a rule is wrapped; all others (`eqx.nn.MLP`, `eqx.nn.MultiheadAttention`, lists, your own
    modules) are searched for such layers. Layers that are tagged already stay as they are. The result computes what
    `model` does and has the same array leaves in the same order, so that files written by
    `eqx.tree_serialise_leaves` fit both.

    **Arguments:**

    - `model`: any PyTree of modules.
    - `registry`: the rules.
    - `frozen`: what is not to be trained and needs no block: a function of the model that returns one of its nodes or
        a sequence of them, as the `where` of `eqx.tree_at`. Give the optimizer the same.

    **Returns:** the tagged model.

    **Raises:** `ValueError` if a parameter that is to be trained has no block, naming it.
    """

    def is_layer(node):
        return is_tagged(node) or type(node) in registry.rules

    tagged = jax.tree.map(
        lambda node: registry.apply(node) if is_layer(node) and not is_tagged(node) else node, model, is_leaf=is_layer
    )
    split_parameters(tagged, frozen)
    return tagged


def untag(model: Model) -> Model:
    """The model without its tags: `untag(tag(model))` is `model`."""
    return jax.tree.map(lambda node: node.layer if is_tagged(node) else node, model, is_leaf=is_tagged)


def split_parameters(model: Model, frozen: Where | None) -> tuple[Parameters, Model]:
    """Parts a tagged model into the parameters to be trained and the rest, as `eqx.partition` does.

    **Raises:** `ValueError` if a parameter that is to be trained has no block, or if there is none to train.
    """
    spec = trainable(model, frozen)
    missing = untagged(model, spec)
    if missing:
        raise ValueError(_untagged_message(model, missing))
    parameters, rest = eqx.partition(model, spec)
    if not tagged_layers(parameters):
        raise ValueError(
            "The model has no parameter to train. Parameters are floating-point arrays in tagged layers, less what "
            "`frozen` selects."
        )
    return parameters, rest


def trainable(model: Model, frozen: Where | None) -> PyTree[bool]:
    """Which leaves of a model are to be trained: all real floating-point arrays but those in `frozen(model)`."""
    excluded = set()
    if frozen is not None:
        excluded = {id(leaf) for leaf in jax.tree.leaves(frozen(model)) if eqx.is_array(leaf)}
        unknown = excluded - {id(leaf) for leaf in jax.tree.leaves(model)}
        if unknown or not excluded:
            raise ValueError(
                "`frozen` must return nodes of the model, as in `frozen=lambda model: [model.embedding, "
                "model.layers[0].bias]`, but it returned arrays that are not among the model's leaves, or none at all."
            )
    return jax.tree.map(lambda leaf: eqx.is_inexact_array(leaf) and id(leaf) not in excluded, model)


def untagged(model: Model, spec: PyTree[bool]) -> list[str]:
    """The paths of the leaves that are to be trained but belong to no tagged layer."""
    nodes = jax.tree_util.tree_leaves_with_path(eqx.filter(model, spec), is_leaf=is_tagged)
    return [jax.tree_util.keystr(path) for path, node in nodes if not is_tagged(node)]


def _untagged_message(model: Model, missing: list[str]) -> str:
    first = missing[0]
    named = ", ".join(f"`{path}`" for path in missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
    forgotten = "" if tagged_layers(model) else "No layer is tagged: was the model given to `kfax.tag`? "
    return (
        f"{forgotten}These parameters of {type(model).__name__} are to be trained but have no curvature block: "
        f"{named}. "
        "kfax does not choose a weaker block behind your back. Either\n"
        "  1. register a rule for the module that holds them: `kfax.tag(model, "
        "registry=kfax.default_registry.register(MyModule, rule))`;\n"
        "  2. choose a block explicitly, by wrapping the layer yourself: `kfax.TaggedLinear(layer, "
        "block=kfax.KroneckerFactored())`;\n"
        f"  3. freeze them, in `kfax.tag`, `kfax.coverage` and the optimizer: `frozen=lambda model: model{first}`.\n"
        "`print(kfax.coverage(model))` shows what each parameter has."
    )

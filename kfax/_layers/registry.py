"""Which tagged layer a module becomes, and tagging a whole model."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._blocks import Block, EigenvalueCorrected, KroneckerFactored, KroneckerSum
from .._math.arguments import selection
from .._math.tree import distinct
from .._math.types import Model, Parameters, PyTree, Where
from .._operations import FactoredOperation, Transposed
from .base import (
    empty_slots,
    is_tagged,
    layer_parts,
    parts,
    replace_layers,
    tagged_layers,
    TaggedLayer,
    unlisted,
)
from .convolution import TaggedConv, TaggedConvTranspose
from .embedding import TaggedEmbedding
from .linear import TaggedLinear
from .recurrent import TaggedGRUCell, TaggedLSTMCell
from .scale_shift import TaggedBatchNorm, TaggedNorm, TaggedPReLU
from .shared import borrowed


Rule = Callable[[Any], TaggedLayer] | None


class Registry:
    """Rules that make tagged layers of modules, by exact module type. Immutable: `register` returns a new one.

    A subclass of a registered type is not covered by its rule, since it may compute something else.
    """

    rules: Mapping[type, Rule]

    def __init__(self, rules: Mapping[type, Rule] | None = None):
        """**Arguments:**

        - `rules`: from the type of a module to a function that wraps a module of this type in a tagged layer; or to
            `None`, for modules that use the parameters of the layers inside them in ways of their own, and must not be
            searched for layers.
        """
        if not (rules is None or isinstance(rules, Mapping)):
            raise ValueError(f"`rules` must be a dictionary from types of modules to functions, got {rules!r}.")
        self.rules = types.MappingProxyType(dict(rules or {}))

    def register(self, module_type: type, rule: Rule) -> "Registry":
        """A registry with one more rule, or one replaced.

        **Arguments:**

        - `module_type`: a class of modules.
        - `rule`: wraps a module of that class in a tagged layer, for instance
            `lambda linear: kfax.TaggedLinear(linear, block=kfax.KroneckerFactored(kfax.Reduce()))`. With `None` modules
            of that class are left as they are, with everything inside. For modules that kfax knows nothing of:
            `lambda module: kfax.TaggedModule(module, block=kfax.Diagonal())`.

        **Raises:** `ValueError` if `module_type` is not a class, or `rule` not a function.
        """
        if not isinstance(module_type, type):
            raise ValueError(
                f"`register` takes the class of a module, such as `eqx.nn.Linear`, got {module_type!r}. To tag one "
                "particular layer differently, wrap it yourself, as in `kfax.TaggedLinear(layer, block=...)`."
            )
        if not (rule is None or callable(rule)):
            raise ValueError(
                f"`rule` must be a function from a module to a tagged layer, got {rule!r}. For another block: "
                "`lambda linear: kfax.TaggedLinear(linear, block=...)`."
            )
        return Registry({**self.rules, module_type: rule})

    def apply(self, module: Any) -> TaggedLayer:
        """Wraps one module by the rule for its type.

        **Raises:** `ValueError` if there is no such rule, or if it does not return a tagged layer.
        """
        name = type(module).__name__
        rule = self.rules.get(type(module))
        if rule is None:
            raise ValueError(
                f"The registry has no rule for `{name}`. Add one with `registry.register({name}, rule)`, where "
                "`rule(module)` returns a `kfax.TaggedLayer`. It has rules for: "
                f"{', '.join(sorted(t.__name__ for t in self.rules)) or 'nothing'}."
            )
        layer = rule(module)
        if not is_tagged(layer):
            raise ValueError(
                f"The rule registered for `{name}` must return a `kfax.TaggedLayer`, such as "
                f"`kfax.TaggedLinear(module)`, but it returned {type(layer).__name__}."
            )
        return layer


default_registry: Registry = Registry(
    {
        eqx.nn.Linear: TaggedLinear,
        eqx.nn.Embedding: TaggedEmbedding,
        eqx.nn.GRUCell: TaggedGRUCell,
        eqx.nn.LSTMCell: TaggedLSTMCell,
        eqx.nn.BatchNorm: TaggedBatchNorm,
        eqx.nn.PReLU: TaggedPReLU,
        **dict.fromkeys((eqx.nn.Conv, eqx.nn.Conv1d, eqx.nn.Conv2d, eqx.nn.Conv3d), TaggedConv),
        eqx.nn.ConvTranspose: TaggedConvTranspose,
        eqx.nn.ConvTranspose1d: TaggedConvTranspose,
        eqx.nn.ConvTranspose2d: TaggedConvTranspose,
        eqx.nn.ConvTranspose3d: TaggedConvTranspose,
        **dict.fromkeys((eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm), TaggedNorm),
        # The weight in these is not what the layer inside them multiplies with.
        eqx.nn.WeightNorm: None,
        eqx.nn.SpectralNorm: None,
    }
)


def tag(
    model: Model, *, registry: Registry = default_registry, block: Block | None = None, frozen: Where | None = None
) -> Model:
    """Wraps every layer of a model in the tagged layer that the registry has for it.

    The outermost module with a rule is wrapped; all others (`eqx.nn.MLP`, `eqx.nn.MultiheadAttention`, lists, your own
    modules) are searched for such layers. Layers that are tagged already stay as they are. The result computes what
    `model` does and has the same array leaves in the same order, so that files written by
    `eqx.tree_serialise_leaves` fit both. An embedding whose matrix `eqx.nn.Shared` also gives to an output head gets
    the block [`kfax.KroneckerSum`][].

    **Arguments:**

    - `model`: any PyTree of modules.
    - `registry`: the rules.
    - `block`: of all layers that are wrapped here, in place of what the rules choose. A [`kfax.KroneckerFactored`][],
        [`kfax.EigenvalueCorrected`][] or [`kfax.KroneckerSum`][] needs the inputs of a matrix: operations without them
        (scale and shift of a normalization, the slopes of a PReLU, a [`kfax.TaggedModule`][]) keep the block of their
        rule. Any other block is given to all. [`kfax.coverage`][] shows what each has.
    - `frozen`: what is not to be trained and needs no block: a function of the model that returns one of its nodes or
        a sequence of them, as the `where` of `eqx.tree_at`. Give the optimizer the same.

    **Returns:** the tagged model.

    **Raises:** `ValueError` if a parameter that is to be trained has no block, naming it, or if `eqx.nn.Shared` gives
    one to a layer that does something else with it than multiply by the same matrix or its transpose.
    """

    if not isinstance(registry, Registry):
        raise ValueError(
            "`registry` must be a `kfax.Registry`, such as `kfax.default_registry.register(MyModule, rule)`, got "
            f"{registry!r}."
        )

    def is_layer(node):
        return is_tagged(node) or type(node) in registry.rules

    if not (block is None or isinstance(block, Block)):
        raise ValueError(
            f"`block` of `kfax.tag` must be one block, such as `kfax.Diagonal()`, got {block!r}. For other blocks in "
            "single layers see `kfax.set_block`."
        )

    def wrap(node):
        if is_tagged(node) or registry.rules.get(type(node)) is None:
            return node
        layer = registry.apply(node)
        return layer if block is None else _with_block_where_it_fits(layer, block)

    tagged = _tie(jax.tree.map(wrap, model, is_leaf=is_layer), already=tagged_layers(model))
    split_parameters(tagged, frozen)
    return tagged


def _tie(model: Model, already: Mapping[str, TaggedLayer]) -> Model:
    """Gives layers whose matrix another layer uses transposed a block for that, unless their block was chosen."""
    owners = {loan.owner for loan in borrowed(model, trainable(model, None)) if isinstance(loan.operation, Transposed)}
    layers = {}
    for path, layer in tagged_layers(model).items():
        keys = {part.key for part in layer_parts(path, eqx.filter(layer, eqx.is_inexact_array))}
        if keys & owners and path not in already and isinstance(layer.block, KroneckerFactored | EigenvalueCorrected):
            layers[path] = _with_block(layer, KroneckerSum(layer.block.sharing, max_dim=layer.block.max_dim))
    return replace_layers(model, layers)


def set_block(model: Model, where: Where | str, block: Block | Mapping[str, Block]) -> Model:
    """Changes the curvature block of some layers of a tagged model.

    **Arguments:**

    - `model`: the tagged model.
    - `where`: a function of the model that returns tagged layers, or nodes that contain some, as in `equinox.tree_at`:
        `lambda model: [model.layers[0], model.head]`, or `lambda model: model` for all. Or the path of such a node as
        [`kfax.coverage`][] prints it.
    - `block`: the new block of all these layers; for layers with several operations, it may be a dictionary with a
        block for each of them, by name, none left out.

    **Returns:** the model with that block. Its structure is another one: gradients and states of the old model do not
    fit it.

    **Raises:** `ValueError` if there is no tagged layer there.
    """
    model = distinct(model)
    layers = tagged_layers(model)
    if not isinstance(block, Block | Mapping):
        raise ValueError(f"`block` of `kfax.set_block` must be a block, such as `kfax.Diagonal()`, got {block!r}.")
    if not isinstance(where, str):
        selection("`where` of `kfax.set_block`, if it is no path such as `'.layers[0]'`,", where)
    if isinstance(where, str):
        chosen = {path: layer for path, layer in layers.items() if _is_within(path, where)}
    else:
        nodes = {id(node) for node in jax.tree.leaves(where(model), is_leaf=is_tagged) if is_tagged(node)}
        chosen = {path: layer for path, layer in layers.items() if id(layer) in nodes}
    if not chosen:
        layer, _, operation = where.rpartition("/") if isinstance(where, str) else ("", "", "")
        names = list(layers[layer].operations()) if layer in layers else []
        if operation in names:
            raise ValueError(
                f"`{where}` is one of several operations of the layer at `{layer}`: call `kfax.set_block(model, "
                f"{layer!r}, blocks)`, with a dictionary of blocks for all of {names}."
            )
        places = ", ".join(f"`{path}`" for path in layers) or "no place: was it given to `kfax.tag`?"
        raise ValueError(
            f"`where` of `kfax.set_block` must select tagged layers of the model, but there is none in {where!r}. "
            f"The tagged layers are at {places}."
        )
    new = block if isinstance(block, Block) else dict(block)
    return replace_layers(model, {path: _with_block(layer, new) for path, layer in chosen.items()})


def _with_block(layer: TaggedLayer, block: Block | dict[str, Block]) -> TaggedLayer:
    changed = eqx.tree_at(lambda tagged: tagged.block, layer, block, is_leaf=lambda node: node is layer.block)
    changed.__check_init__()
    return changed


def _with_block_where_it_fits(layer: TaggedLayer, block: Block) -> TaggedLayer:
    """With a block for all operations but those without the inputs that it needs."""
    needs_inputs = isinstance(block, KroneckerFactored | EigenvalueCorrected | KroneckerSum)
    operations = layer.operations()
    misfits = [name for name, op in operations.items() if needs_inputs and not isinstance(op, FactoredOperation)]
    if not misfits:
        return _with_block(layer, block)
    return _with_block(layer, {name: layer.block_of(name) if name in misfits else block for name in operations})


def _is_within(path: str, prefix: str) -> bool:
    """Whether a path is `prefix`, or of something inside it."""
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", ".", "[")


def untag(model: Model) -> Model:
    """The model without its tags: `untag(tag(model))` is `model`."""
    return jax.tree.map(lambda node: node.layer if is_tagged(node) else node, model, is_leaf=is_tagged)


def parameters_of(model: Model, *, frozen: Where | None = None) -> Parameters:
    """What is trained of a model: the PyTree that gradients, and the vectors of all estimators, are like.

    **Arguments:**

    - `model`: tagged or not.
    - `frozen`: as in [`kfax.tag`][].

    **Returns:** the model with `None` in place of everything else, such as integers, functions and what is frozen.
    """
    model = empty_slots(model)  # within a `loss_fn` they may be filled
    return eqx.filter(model, trainable(model, frozen))


def split_parameters(model: Model, frozen: Where | None) -> tuple[Parameters, Model]:
    """Parts a tagged model into the parameters to be trained and the rest, as `eqx.partition` does.

    **Raises:** `ValueError` if a parameter that is to be trained has no block, or if there is none to train.
    """
    spec = trainable(model, frozen)
    missing = untagged(model, spec)
    if missing:
        raise ValueError(_untagged_message(model, missing))
    parameters, rest = eqx.partition(model, spec)
    _check_real(parameters)
    for path, layer in tagged_layers(parameters).items():
        if unlisted(layer):
            raise ValueError(
                f"`operations` of {type(layer).__name__}, at `{path}`, must list every array in exactly one operation, "
                f"as it is, but {', '.join(f'`{name}`' for name in unlisted(layer))} is in none of them or in several. "
                "What is not to be trained can be frozen with `frozen=`."
            )
    if not parts(parameters):
        raise ValueError(
            "The model has no parameter to train. Parameters are floating-point arrays in tagged layers, less what "
            "`frozen` selects."
        )
    return parameters, rest


def any_parameters_of(model: Model, frozen: Where | None) -> Parameters:
    """What is trained of a model, tagged or not, for what needs no blocks.

    **Raises:** `ValueError` if a parameter is complex, or if there is none to train.
    """
    parameters = parameters_of(model, frozen=frozen)
    _check_real(parameters)
    if not jax.tree.leaves(parameters):
        raise ValueError(
            "The model has no parameter to train. Parameters are floating-point arrays, less what `frozen` selects."
        )
    return parameters


def _check_real(parameters: Parameters) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        if jnp.iscomplexobj(leaf):
            raise ValueError(
                f"The parameter at `{jax.tree_util.keystr(path)}` is complex, and kfax trains real parameters: hold "
                "its real and imaginary parts as two arrays, or freeze it with `frozen=`."
            )


def trainable(model: Model, frozen: Where | None) -> PyTree:
    """Which leaves of a model are to be trained: all real floating-point arrays but those in `frozen(model)`."""
    excluded = set()
    if frozen is not None:
        frozen, model = selection("`frozen`", frozen), distinct(model)
        excluded = {id(leaf) for leaf in jax.tree.leaves(frozen(model)) if eqx.is_array(leaf)}
        unknown = excluded - {id(leaf) for leaf in jax.tree.leaves(model)}
        if unknown or not excluded:
            raise ValueError(
                "`frozen` must return nodes of the model, as in `frozen=lambda model: [model.embedding, "
                "model.layers[0].bias]`, but it returned arrays that are not among the model's leaves, or none at all."
            )

    def is_trained(node):
        if isinstance(node, eqx.nn.StateIndex):  # the initial value of a state is no parameter
            return jax.tree.map(lambda _: False, node)
        return eqx.is_inexact_array(node) and id(node) not in excluded

    return jax.tree.map(is_trained, model, is_leaf=lambda node: isinstance(node, eqx.nn.StateIndex))


def untagged(model: Model, spec: PyTree) -> list[str]:
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
        "  2. choose a block explicitly, by wrapping the module yourself: `kfax.TaggedModule(module, "
        "block=kfax.Diagonal())` takes any module;\n"
        f"  3. freeze them, in `kfax.tag`, `kfax.coverage` and the optimizer: `frozen=lambda model: model{first}`.\n"
        "`print(kfax.coverage(model))`, of a tagged model, shows what each parameter has."
    )

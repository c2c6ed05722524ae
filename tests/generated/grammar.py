"""Structures as data, and how hypothesis draws them: a model of nested pieces, and all that is done with it."""

import dataclasses

from hypothesis import strategies as st


LAYERS = (
    *("linear", "linear-no-bias", "conv1d", "conv1d-groups", "conv2d", "conv-transpose", "embedding", "gru", "lstm"),
    *("layer-norm", "rms-norm", "group-norm", "prelu", "attention", "own", "tied", "tied-embedding"),
)
# A table of positions computes the same for every example, which takes a named axis.
NAMED_ONLY = ("positions", "mixed-cond")
WRAPPERS = (
    *("residual", "twice", "loop", "stack", "experts", "checkpoint", "jit", "cond", "mixed-cond", "masked"),
    "derivative",
)
NAMED = ("named", "second-axis", "noise-inside", "noise-outside")
LOSSES = ("softmax", "sigmoid", "squared", "poisson", "gaussian_nll", "function-softmax", "function-quartic")
BLOCKS = (
    *("default", "expand", "reduce", "expand-eigh", "reduce-diagonal", "corrected", "corrected-reduce", "tensor"),
    *("diagonal", "full", "unit", "identity", "kl", "frobenius"),
)
SOURCES = ("ggn", "fisher", "empirical")
OPTIMIZERS = (*("plain", "explicit", "staggered", "quadratic", "norm", "power", "rejection", "micro", "relative"),)
# What kfax refuses: a weight that is used behind its tag's back, and axes that do not tell the examples.
MISTAKEN_LAYERS = ("raw", "tied-transposed")
MISTAKEN_LAYOUTS = ("loop", "split", "noise-outside-unnamed")


@dataclasses.dataclass(frozen=True)
class Node:
    """A layer, or what is put around another node."""

    kind: str
    inside: "Node | None" = None

    def kinds(self) -> tuple[str, ...]:
        return (self.kind, *(self.inside.kinds() if self.inside else ()))


@dataclasses.dataclass(frozen=True)
class Structure:
    """What is compiled once, for any numbers."""

    nodes: tuple[Node, ...]
    layout: str = "named"
    per_position: bool = False
    loss: str = "softmax"
    second_loss: bool = False
    weighted: bool = False
    masked: bool = False
    mean_over_positions: bool = False
    block: str = "default"
    source: str = "ggn"
    optimizer: str = "plain"
    frozen: str = "nothing"
    num_examples: int = 4
    num_positions: int = 2
    dtype: str = "float64"

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for node in self.nodes for kind in node.kinds())

    @property
    def may_be_refused(self) -> bool:
        """Whether an error is an answer; a result has to be right all the same."""
        unnamed = self.layout not in NAMED
        # Of `gaussian_nll` there is no GGN, and of a `function_loss` no Fisher information.
        unknown = (self.loss, self.source) in {("gaussian_nll", "ggn")} or (
            self.loss.startswith("function") and self.source == "fisher"
        )
        stacked = {"stack", "experts"} & set(self.kinds) and {"prelu", "own"} & set(self.kinds)
        differentiated = {"derivative", "own"} <= set(self.kinds)
        return bool(
            self.layout in MISTAKEN_LAYOUTS
            or set(self.kinds) & set(MISTAKEN_LAYERS)
            or (unnamed and set(self.kinds) & set(NAMED_ONLY))
            or unknown
            or stacked
            or differentiated
        )

    @property
    def uses_each_layer_once(self) -> bool:
        """At one position of each example, and seen by kfax as such: Kronecker products of one example are exact."""
        usual = {"linear", "linear-no-bias", "embedding", "residual", "checkpoint", "jit"}
        return self.num_positions == 1 and not self.layout.startswith("noise") and set(self.kinds) <= usual


@st.composite
def nodes(draw, layers=LAYERS):
    node = Node(draw(st.sampled_from(layers)))
    for kind in draw(st.lists(st.sampled_from(WRAPPERS), max_size=2)):
        node = Node(kind, node)
    return node


@st.composite
def structures(draw):
    """One in five has something that kfax may refuse."""
    is_lawful = draw(st.sampled_from([True] * 4 + [False]))
    layers = LAYERS + ("positions",) if is_lawful else LAYERS + ("positions",) + MISTAKEN_LAYERS
    pieces = tuple(draw(st.lists(nodes(layers), min_size=1, max_size=3)))
    kinds = {kind for piece in pieces for kind in piece.kinds()}
    layouts = NAMED if is_lawful and kinds & set(NAMED_ONLY) else ("plain", "plain", *NAMED)
    layouts = layouts if is_lawful else layouts + MISTAKEN_LAYOUTS
    loss, source = draw(st.sampled_from(LOSSES)), draw(st.sampled_from(SOURCES))
    if is_lawful and (loss, source) == ("gaussian_nll", "ggn"):
        source = "fisher"
    if is_lawful and loss.startswith("function") and source == "fisher":
        source = "ggn"
    per_position, layout = draw(st.booleans()), draw(st.sampled_from(layouts))
    # Batches are split along axis 0.
    optimizers = [name for name in OPTIMIZERS if name != "micro" or layout != "second-axis"]
    return Structure(
        nodes=pieces,
        layout=layout,
        per_position=per_position,
        loss=loss,
        second_loss=draw(st.sampled_from([False, False, True])),
        weighted=draw(st.booleans()),
        masked=draw(st.booleans()),
        mean_over_positions=per_position and draw(st.booleans()),
        block=draw(st.sampled_from(BLOCKS)),
        source=source,
        optimizer=draw(st.sampled_from(optimizers)),
        frozen=draw(st.sampled_from(["nothing", "nothing", "first", "head-bias", "head-weight", "first-weight"])),
        num_examples=draw(st.sampled_from([4, 4, 3, 2, 1])),
        num_positions=draw(st.sampled_from([1, 2, 3])),
        dtype=draw(st.sampled_from(["float64"] * 4 + ["float32"])),
    )

from .base import (
    Blocks as Blocks,
    fill_slots as fill_slots,
    from_matrices as from_matrices,
    is_tagged as is_tagged,
    layer_parts as layer_parts,
    masked as masked,
    Part as Part,
    parts as parts,
    replace_layers as replace_layers,
    Slots as Slots,
    tagged_layers as tagged_layers,
    TaggedLayer as TaggedLayer,
    to_matrices as to_matrices,
    unlisted as unlisted,
)
from .convolution import TaggedConv as TaggedConv, TaggedConvTranspose as TaggedConvTranspose
from .coverage import Coverage as Coverage, coverage as coverage, CoverageRow as CoverageRow
from .devices import DeviceRow as DeviceRow
from .embedding import TaggedEmbedding as TaggedEmbedding
from .linear import TaggedLinear as TaggedLinear
from .module import TaggedModule as TaggedModule
from .recurrent import TaggedGRUCell as TaggedGRUCell, TaggedLSTMCell as TaggedLSTMCell
from .registry import (
    any_parameters_of as any_parameters_of,
    default_registry as default_registry,
    parameters_of as parameters_of,
    Registry as Registry,
    set_block as set_block,
    split_parameters as split_parameters,
    tag as tag,
    trainable as trainable,
    untag as untag,
)
from .scale_shift import TaggedBatchNorm as TaggedBatchNorm, TaggedNorm as TaggedNorm, TaggedPReLU as TaggedPReLU
from .shared import Borrowed as Borrowed, borrowed as borrowed

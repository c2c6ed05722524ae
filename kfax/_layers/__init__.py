from .base import (
    fill_slots as fill_slots,
    from_matrices as from_matrices,
    is_tagged as is_tagged,
    tagged_layers as tagged_layers,
    TaggedLayer as TaggedLayer,
    to_matrices as to_matrices,
)
from .linear import TaggedLinear as TaggedLinear

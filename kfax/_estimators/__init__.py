from .base import (
    check_source as check_source,
    CurvatureEstimator as CurvatureEstimator,
    measured_across as measured_across,
    total_weight as total_weight,
)
from .block_curvature import BlockCurvature as BlockCurvature
from .block_diagonal import (
    BlockDiagonalCurvature as BlockDiagonalCurvature,
    BlockDiagonalState as BlockDiagonalState,
)
from .damping import wide as wide
from .eigenbases import (
    axes_of as axes_of,
    full_bases as full_bases,
    no_bases as no_bases,
    spectra_in as spectra_in,
    turned_bases as turned_bases,
)
from .eigendecomposition import Eigendecomposition as Eigendecomposition
from .explicit_exact import (
    ExplicitExactCurvature as ExplicitExactCurvature,
    ExplicitExactState as ExplicitExactState,
)
from .implicit_exact import (
    ImplicitExactBatch as ImplicitExactBatch,
    ImplicitExactCurvature as ImplicitExactCurvature,
    ImplicitExactState as ImplicitExactState,
)
from .last_batch import LastBatchCurvature as LastBatchCurvature
from .placed import PlacedCurvature as PlacedCurvature, PlacedState as PlacedState
from .placement import Placement as Placement
from .products import check_layout as check_layout, Hessian as Hessian, layout_of as layout_of
from .sample_space import (
    SampleSpaceBatch as SampleSpaceBatch,
    SampleSpaceCurvature as SampleSpaceCurvature,
    SampleSpaceState as SampleSpaceState,
)
from .sources import (
    check_deterministic as check_deterministic,
    CotangentSource as CotangentSource,
    CurvaturePropagation as CurvaturePropagation,
    CurvatureSource as CurvatureSource,
    EmpiricalFisher as EmpiricalFisher,
    ExactFisher as ExactFisher,
    ExactGGN as ExactGGN,
    SampledFisher as SampledFisher,
)

"""The Kronecker product with the traces of the exact block."""

from typing import ClassVar

import equinox as eqx

from .kronecker import check_max_dim
from .product import check_inversion, Cholesky, Inverse, Inversion
from .weighted import WeightedFactors, WeightedProduct, Weights


class TensorNormal(WeightedProduct):
    r"""The Kronecker product with the trace and both partial traces of the exact block.

    $$\frac{G \otimes A}{\mathrm{tr}\, A}, \quad A = \tfrac1N \sum_n D_n^\top D_n, \quad
    G = \tfrac1N \sum_n D_n D_n^\top, \quad D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    $\mathrm{tr}\, A = \mathrm{tr}\, G$ is the trace of the exact block, and A and G are the sums of its diagonal blocks
    of either kind. [`kfax.KroneckerFactored`][] has none of the three where inputs and cotangents are correlated: here
    examples with large cotangents count more in A, and those with large inputs more in G. For any operation, and
    however often a layer is used.

    A factor is diagonal, with the diagonal of the partial trace, on the side of an embedding's entries, and where its
    side of V is longer than `max_dim`.

    Memory: `2 (d_a² + d_g²)` numbers; and one for each parameter and example, during an update if the layer is called
    more than once or not known to be called once, and otherwise while its statistics are made, unless it has few
    positions. An update takes about `2 (d_a² + d_g²)` flops for each example of a layer that is used once at one
    position, at most `2 d_a d_g (d_a + d_g)` otherwise; a refresh `2 (d_a³ + d_g³)`, a solve `2 d_a d_g (d_a + d_g)`.

    ??? cite "Source"
        Ren & Goldfarb 2021, arXiv:2106.02925 (TNT); Gao et al. 2020, arXiv:2011.10741 (trace-restricted K-FAC).
        Differs: by the gradients of whole examples, summed over positions.
    """

    is_weighted: ClassVar[bool] = False
    max_dim: int = eqx.field(static=True)
    inversion: Inversion

    def __init__(self, *, max_dim: int = 4096, inversion: Inversion = Cholesky()):
        """**Arguments:**

        - `max_dim`: as for [`kfax.KroneckerFactored`][].
        - `inversion`: [`kfax.Cholesky`][]`()` for factored damping, or [`kfax.Eigh`][]`()` for exact damping, which may
            change without a refresh.

        **Raises:** `ValueError` for something else than that.
        """
        self.max_dim, self.inversion = check_max_dim(max_dim), check_inversion(inversion)

    def weights(self, statistics: WeightedFactors, inverse: Inverse) -> Weights:
        return None, None

"""The Kronecker product closest to the exact block in the Frobenius norm."""

from typing import ClassVar

import equinox as eqx

from .kronecker import check_max_dim
from .product import check_inversion, Cholesky, Inverse, Inversion
from .weighted import WeightedFactors, WeightedProduct, Weights


class FrobeniusOptimal(WeightedProduct):
    r"""The Kronecker product that comes closest to the exact block in the Frobenius norm (KFOC), by iteration.

    $$\frac{G \otimes A}{s}, \quad A = \tfrac1N \sum_n D_n^\top W_G D_n, \quad
    G = \tfrac1N \sum_n D_n W_A D_n^\top, \quad s = \tfrac1N \sum_n \mathrm{tr}(D_n^\top W_G D_n W_A), \quad
    D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    with weights $W_G \propto G$ and $W_A \propto A$ as of the last refresh. Before the first one they are the identity,
    and the block is [`kfax.TensorNormal`][]. With the weights of a refresh the measurement is one step of the power
    iteration for the nearest Kronecker product: refreshes and updates in turn, on the same data, lead to it. An exact
    block that is a Kronecker product is found at once, whatever the weights.

    What is closest in this norm has the largest eigenvalues right. In an inverse the small ones count: for that, see
    [`kfax.KLOptimal`][].

    Between two refreshes the weights stay as they are, so that the statistics of a data set are exact however it is
    split; after one the running average mixes statistics with different weights, until the old ones are forgotten.
    [`kfax.BlockDiagonalCurvature`][]`.restart` forgets them at once, and keeps the weights: a further pass over the
    data is a further step of the iteration. For any operation, and however often a layer is used.

    A factor is diagonal where that of [`kfax.TensorNormal`][] is; then it is the best of those.

    Memory: `3 (d_a² + d_g²)` numbers, and for gradients as for [`kfax.TensorNormal`][]. An update takes about
    `4 (d_a² + d_g²)` flops for each example of a layer that is used once at one position, at most
    `4 d_a d_g (d_a + d_g)` otherwise; a refresh `2 (d_a³ + d_g³)`, a solve `2 d_a d_g (d_a + d_g)`.

    ??? cite "Source"
        Schnaus et al. 2021 (KFOC); Koroko et al. 2022, arXiv:2201.10285 (KPSVD), section 3; Van Loan & Pitsianis 1993.
        Differs: one step of the iteration for each refresh, on a running average, in place of a decomposition of each
        batch; by the gradients of whole examples, summed over positions.
    """

    is_weighted: ClassVar[bool] = True
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
        return statistics.g, statistics.a

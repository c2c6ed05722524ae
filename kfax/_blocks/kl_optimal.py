"""The Kronecker product closest to the exact block in the Kullback-Leibler divergence."""

from typing import cast, ClassVar

import equinox as eqx

from .kronecker import check_max_dim
from .product import check_inversion, Cholesky, Inverse, Inversion, ProductInverse, SpectralInverse
from .weighted import WeightedFactors, WeightedProduct, Weights


class KLOptimal(WeightedProduct):
    r"""The Kronecker product that comes closest to the exact block in the Kullback-Leibler divergence, by iteration.

    $$\frac{G \otimes A}{s}, \quad A = \tfrac1N \sum_n D_n^\top W_G D_n, \quad
    G = \tfrac1N \sum_n D_n W_A D_n^\top, \quad s = \tfrac1N \sum_n \mathrm{tr}(D_n^\top W_G D_n W_A), \quad
    D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    with the inverse factors of the last refresh, damped as they are, as weights $W_G \propto G^{-1}$ and
    $W_A \propto A^{-1}$. Before the first one they are the identity, and the block is [`kfax.TensorNormal`][], which it
    nearly remains with a λ above most eigenvalues. Refreshes and updates in turn, on the same data and with a small λ,
    lead to the product P that minimizes $\mathrm{tr}(P^{-1} C) + \log\det P$ for the exact block C: of normal
    distributions with mean zero and these covariances the closest one, and the maximum likelihood of the gradients. An
    exact block that is a Kronecker product is found at once, whatever the weights.

    This divergence is the same in any linear coordinates of inputs and outputs: small eigenvalues count as much as
    large ones. With fewer examples than a side of V has numbers λ keeps the factors apart from singular ones.

    Between two refreshes the weights stay as they are, so that the statistics of a data set are exact however it is
    split; after one the running average mixes statistics with different weights, until the old ones are forgotten.
    [`kfax.BlockDiagonalCurvature`][]`.restart` forgets them at once, and keeps the weights: a further pass over the
    data is a further step of the iteration. For any operation, and however often a layer is used.

    A factor is diagonal where that of [`kfax.TensorNormal`][] is; then it is the best of those.

    Memory: `3 (d_a² + d_g²)` numbers, and for gradients as for [`kfax.TensorNormal`][]. An update takes about
    `4 (d_a² + d_g²)` flops for each example of a layer that is used once at one position, at most
    `4 d_a d_g (d_a + d_g)` otherwise; a refresh `2 (d_a³ + d_g³)`, a solve `2 d_a d_g (d_a + d_g)`.

    ??? cite "Source"
        Lin et al. 2025, arXiv:2509.03378 (KL-Shampoo); Dutilleul 1999 for the iteration. Differs: by the gradients of
        examples, not of batches; weights of the last refresh; the power that is preconditioned by is the
        preconditioner's.
    """

    is_weighted: ClassVar[bool] = True
    max_dim: int = eqx.field(static=True)
    inversion: Inversion

    def __init__(self, *, max_dim: int = 4096, inversion: Inversion = Cholesky()):
        """**Arguments:**

        - `max_dim`: as for [`kfax.KroneckerFactored`][].
        - `inversion`: [`kfax.Cholesky`][]`()` for factored damping, or [`kfax.Eigh`][]`()` for exact damping, which may
            change without a refresh. The weights are damped by factors with either.

        **Raises:** `ValueError` for something else than that.
        """
        self.max_dim, self.inversion = check_max_dim(max_dim), check_inversion(inversion)

    def weights(self, statistics: WeightedFactors, inverse: Inverse) -> Weights:
        return cast(ProductInverse | SpectralInverse, inverse).factors()

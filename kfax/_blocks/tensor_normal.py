"""A Kronecker product made of the gradients of single examples."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._operations import MatrixShape
from .gradients import GradientBlock
from .product import check_inversion, Cholesky, Inversion, Product


class TensorNormal(GradientBlock):
    r"""The Kronecker product with the trace and both partial traces of the exact block.

    $$\frac{G \otimes A}{\mathrm{tr}\, A}, \quad A = \tfrac1N \sum_n D_n^\top D_n, \quad
    G = \tfrac1N \sum_n D_n D_n^\top, \quad D_n = \textstyle\sum_r g_{nr} \bar a_{nr}^\top$$

    $\mathrm{tr}\, A = \mathrm{tr}\, G$ is the trace of the exact block, and A and G are the sums of its diagonal blocks
    of either kind. [`kfax.KroneckerFactored`][] has none of the three where inputs and cotangents are correlated: here
    examples with large cotangents count more in A, and those with large inputs more in G. For any operation, and
    however often a layer is used. Both factors are dense.

    Memory: `2 (d_a² + d_g²)` numbers, and one for each parameter and example during an update. An update takes about
    `2 d_a d_g (d_a + d_g)` flops for each example, a refresh `2 (d_a³ + d_g³)`, a solve `2 d_a d_g (d_a + d_g)`.

    ??? cite "Source"
        Ren & Goldfarb 2021, arXiv:2106.02925 (TNT); Gao et al. 2020, arXiv:2011.10741 (trace-restricted K-FAC).
        Differs: by the gradients of whole examples, summed over positions.
    """

    inversion: Inversion

    def __init__(self, *, inversion: Inversion = Cholesky()):
        """**Arguments:**

        - `inversion`: [`kfax.Cholesky`][]`()` for factored damping, or [`kfax.Eigh`][]`()` for exact damping, which may
            change without a refresh.

        **Raises:** `ValueError` for something else than that.
        """
        self.inversion = check_inversion(inversion)

    def squares(
        self, shape: MatrixShape, gradients: Float[Array, "*leading n d_g d_a"]
    ) -> tuple[Float[Array, "*leading d_a d_a"], Float[Array, "*leading d_g d_g"]]:
        columns = jnp.einsum("...nij,...nik->...jk", gradients, gradients)
        rows = jnp.einsum("...nij,...nkj->...ik", gradients, gradients)
        return columns, rows

    def product(
        self, shape: MatrixShape, statistics: tuple[Float[Array, "*leading d_a d_a"], Float[Array, "*leading d_g d_g"]]
    ) -> Product:
        a, g = statistics
        trace = jnp.trace(a, axis1=-2, axis2=-1)[..., None, None]
        return Product(g / jnp.where(trace > 0, trace, 1), a, len(shape.leading))

    def refresh_flops(self, shape: MatrixShape) -> int:
        return shape.num_matrices * sum(self.inversion.refresh_flops(size) for size in (shape.d_a, shape.d_g))

    def solve_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters * (shape.d_a + shape.d_g) * self.inversion.num_products

    def update_flops(self, shape: MatrixShape) -> int:
        return 2 * shape.num_parameters * (shape.d_a + shape.d_g)

"""Whether what a loss says of itself is true, by numbers."""

from collections.abc import Callable
from typing import NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._math.arguments import single_key
from .._math.mesh import on_automatic_axes
from .._math.types import PRNGKey
from .base import Loss, NaturalLoss


NUM_VECTORS = 8
NUM_DRAWS = 4096

Method = Callable[[Float[Array, "n ..."]], Float[Array, "n ..."]]


@on_automatic_axes
def check_loss(loss: Loss, *, key: PRNGKey) -> tuple[str, ...]:
    """Compares all methods of a loss with each other and with automatic differentiation: a test for your own losses.

    What is checked, on random vectors: that an example's loss depends on its own outputs only; that `ggn_product` is
    the Hessian of `value`, without negative curvature if there is a `ggn_factor`; that the factors and their
    transposes are adjoint and make up that Hessian; and that 4,096 draws of `sampled_gradient` have mean zero and the
    Fisher information as second moment, up to six standard errors. Where the Fisher information is not known, as that
    of a [`kfax.function_loss`][], of the draws only the mean is.

    **Arguments:**

    - `loss`: of a few examples, outside `jit`, with float32 or float64 outputs of moderate size (random normal ones,
        say): draws do not show events that are too rare.
    - `key`: for the random vectors and draws.

    **Returns:** the names of the methods that were not checked because they raise a `ValueError`, as a method does that
    a loss has no answer to.

    **Raises:** `ValueError` that names the loss and the method that is wrong.
    """
    if not isinstance(loss, Loss):
        raise ValueError(f"`check_loss` takes a `kfax.Loss`, got {type(loss).__name__}.")
    dtype = loss.outputs.dtype
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"`check_loss` takes float32 or float64 outputs, to tell errors from rounding, got {dtype}.")
    return _Check(loss, single_key(key)).run()


class _Check:
    """One run of `check_loss`."""

    def __init__(self, loss: Loss, key: PRNGKey):
        self.loss = loss
        self.weights_key, vectors_key, self.draws_key = jax.random.split(key, 3)
        shape = (NUM_VECTORS, *loss.outputs.shape)
        self.left, self.right = jax.random.normal(vectors_key, (2, *shape), loss.outputs.dtype)
        # Rounding errors of all the sums involved, for the dtype.
        self.tolerance = 1e3 * float(jnp.finfo(loss.outputs.dtype).eps)
        self.missing: list[str] = []

    def run(self) -> tuple[str, ...]:
        self.check_independence()
        hessian = eqx.filter_jit(jax.vmap(self.hessian_product))(self.left)
        factored = self.factored("ggn_factor")
        if factored is not None:
            self.check_convexity(hessian)
        product = self.product("ggn_product", self.loss.ggn_product)
        if product is not None:
            self.compare("ggn_product", product, hessian, "the Hessian of `value` times a vector")
        if factored is not None:
            self.compare("ggn_factor", factored, hessian, "a factor of the Hessian of `value`")
        self.check_draws(self.factored("fisher_factor"))
        return tuple(self.missing)

    def check_independence(self) -> None:
        losses, outputs = self.loss.losses(), self.loss.outputs
        if losses.ndim == 0 or losses.shape[0] != len(outputs):
            self.fail("losses", f"it must lead with the {len(outputs)} examples, but is of shape {losses.shape}")
        shape = losses.shape[: max(outputs.ndim - 1, 1)]
        weights = jax.random.normal(self.weights_key, shape, outputs.dtype)

        def weighted(outputs):
            losses = eqx.tree_at(lambda one: one.outputs, self.loss, outputs).losses()
            return jnp.sum(weights.reshape(*shape, *(1,) * (losses.ndim - len(shape))) * losses)

        expected = weights.reshape(*shape, *(1,) * (outputs.ndim - len(shape))) * self.loss.gradient()
        self.compare("losses", jax.grad(weighted)(outputs), expected, "a function of its own example and position only")

    def check_convexity(self, hessian: Float[Array, "k n ..."]) -> None:
        forms = jnp.sum((self.left * hessian).reshape(*hessian.shape[:2], -1), axis=2)
        if jnp.min(forms) < -self.tolerance * jnp.max(jnp.abs(forms)):
            self.fail(
                "ggn_factor",
                f"there is none: the Hessian has negative curvature, {jnp.min(forms):.3g}, which "
                "`kfax.function_loss` leaves out in training",
            )

    def check_draws(self, fisher: Float[Array, "k n ..."] | None) -> None:
        draw = self.available("sampled_gradient", lambda: self.loss.sampled_gradient(self.draws_key))
        if draw is None:
            return
        self.check_shape("sampled_gradient", draw)

        def project(key):
            gradient = self.loss.weigh(self.loss.sampled_gradient(key))
            return jnp.sum((self.left * gradient).reshape(*self.left.shape[:2], -1), axis=2)

        draws = jax.jit(lambda keys: jax.lax.map(project, keys))(jax.random.split(self.draws_key, NUM_DRAWS))
        self.compare_mean("the mean", jnp.sum(draws, axis=2), jnp.zeros(NUM_VECTORS))
        if fisher is not None:
            expected = jnp.sum((self.left * fisher).reshape(NUM_VECTORS, -1), axis=1)
            self.compare_mean("the second moment", jnp.sum(jnp.square(draws), axis=2), expected)

    def hessian_product(self, vector: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """The Hessian of the sum of all examples' losses with weights, by automatic differentiation."""

        def value(outputs):
            return eqx.tree_at(lambda one: one.outputs, self.loss, outputs).value() * self.loss.num_examples

        return jax.jvp(jax.grad(value), (self.loss.outputs,), (vector,))[1].astype(vector.dtype)

    def factored(self, name: str) -> Float[Array, "k n ..."] | None:
        """The factor times its transpose times the random vectors, if there is one; and whether the two are adjoint."""
        factor, transpose = getattr(self.loss, name), getattr(self.loss, f"{name}_transpose")
        weighted = self.product(f"{name}_transpose", transpose)
        plain = self.available(name, lambda: jax.vmap(factor)(self.right))
        if weighted is None or plain is None:
            if weighted is not plain:
                self.fail(name, "either it or its transpose raises a `ValueError`, but not both")
            return None
        self.check_shape(name, plain[0])
        pulled = jax.vmap(transpose)(self.left)
        self.compare(
            f"{name}_transpose",
            jnp.sum((pulled * self.right).reshape(*pulled.shape[:2], -1), axis=2),
            jnp.sum((self.left * plain).reshape(*plain.shape[:2], -1), axis=2),
            f"adjoint to `{name}`",
        )
        return jax.vmap(lambda u: self.loss.weigh(factor(transpose(self.loss.weigh(u)))))(self.left)

    def product(self, name: str, method: Method) -> Float[Array, "k n ..."] | None:
        """A method between weights, applied to the random vectors, if it is available."""
        result = self.available(name, lambda: jax.vmap(lambda u: method(self.loss.weigh(u)))(self.left))
        if result is None:
            return None
        self.check_shape(name, result[0])
        return jax.vmap(self.loss.weigh)(result)

    def available(self, name: str, call: Callable[[], Array]) -> Array | None:
        try:
            return call()
        except ValueError as error:
            if isinstance(self.loss, NaturalLoss):  # it has an answer to everything
                raise ValueError(f"`{type(self.loss).__name__}.{name}` is wrong: {error}") from error
            self.missing.append(name)
            return None

    def check_shape(self, name: str, result: Array) -> None:
        outputs = self.loss.outputs
        if result.shape != outputs.shape or result.dtype != outputs.dtype:
            self.fail(
                name,
                f"it must return an array like the outputs, {outputs.dtype} of shape {outputs.shape}, but returned "
                f"{result.dtype} of shape {result.shape}",
            )

    def compare(self, name: str, actual: Array, expected: Array, meaning: str) -> None:
        error, scale = jnp.max(jnp.abs(actual - expected)), jnp.max(jnp.abs(expected))
        if not error <= self.tolerance * scale:
            self.fail(name, f"it is not {meaning}: off by {error:.3g}, where the largest number is {scale:.3g}")

    def compare_mean(self, noun: str, draws: Float[Array, "d k"], expected: Float[Array, " k"]) -> None:
        bound = 6 * jnp.std(draws, axis=0) / NUM_DRAWS**0.5 + self.tolerance * jnp.max(jnp.abs(draws))
        errors = jnp.abs(jnp.mean(draws, axis=0) - expected)
        worst = jnp.argmax(jnp.where(jnp.isnan(errors), jnp.inf, errors / bound))
        if not errors[worst] <= bound[worst]:
            self.fail(
                "sampled_gradient",
                f"{noun} of its draws is {jnp.mean(draws, axis=0)[worst]:.3g} in a random direction, but should be "
                f"{expected[worst]:.3g} within {bound[worst]:.2g}",
            )

    def fail(self, name: str, reason: str) -> NoReturn:
        raise ValueError(f"`{type(self.loss).__name__}.{name}` is wrong: {reason}.")

"""The check of losses of one's own."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import ALL_LOSSES, grid
from helpers import random

import kfax


KEY = jax.random.key(0)


def loss_of(case, dtype=jnp.float64, **options):
    outputs = random(1, 4, 2, 4).astype(dtype)
    targets = case.targets(jax.random.key(2), outputs.shape)
    targets = targets.astype(dtype) if jnp.issubdtype(targets.dtype, jnp.floating) else targets
    return case.make(outputs, targets, **options)


@grid(
    thin=2,
    slow=lambda loss, dtype: loss not in ("poisson", "gaussian_nll") and dtype == "float32",
    loss=ALL_LOSSES,
    dtype=["float32", "float64"],
)
def test_all_losses_pass_their_check(loss, dtype):
    case = ALL_LOSSES[loss]
    mask = jnp.array([[True, True], [True, False], [False, False], [True, True]])
    made = 3 * loss_of(case, dtype, weights=jnp.arange(1.0, 5), mask=mask, mean_over_positions=True)
    missing = kfax.check_loss(made, key=KEY)
    expected = set() if case.has_ggn else {"ggn_product", "ggn_factor", "ggn_factor_transpose"}
    expected |= set() if case.has_fisher else {"fisher_factor", "fisher_factor_transpose"}
    expected |= set() if case.has_samples else {"sampled_gradient"}
    assert set(missing) == expected


class Squared(kfax.NaturalLoss):
    """Squared error, with a mistake."""

    outputs: jax.Array
    targets: jax.Array
    weighting: kfax.Weighting
    mistake: str = eqx.field(static=True)

    def losses(self):
        difference = self.outputs - self.targets
        if self.mistake == "mixes examples":
            difference = difference - jnp.mean(difference, axis=0)
        if self.mistake == "mixes positions":
            difference = difference + jnp.roll(difference, 1, axis=1)
        if self.mistake == "forgets the examples":
            return jnp.sum(difference**2)
        return difference**2

    def factor(self, vector):
        factor = math.sqrt(2) * vector
        if self.mistake == "factor 2":
            return math.sqrt(2) * factor
        if self.mistake == "shape of a factor":
            return factor[..., 0]
        if self.mistake == "wrong transpose":
            return jnp.flip(factor, axis=-1)
        if self.mistake == "half a factor":
            raise ValueError("There is none.")
        return factor

    def factor_transpose(self, vector):
        transpose = math.sqrt(2) * vector
        if self.mistake == "wrong transpose":
            return jnp.roll(jnp.flip(transpose, axis=-1), 1, axis=-1)
        return math.sqrt(2) * transpose if self.mistake == "factor 2" else transpose

    def sampled_gradient(self, key):
        noise = -math.sqrt(2) * jax.random.normal(key, self.outputs.shape, self.outputs.dtype)
        if self.mistake == "wrong variance":
            return 1.1 * noise
        if self.mistake == "biased sampling":
            return noise + 0.1
        if self.mistake == "given targets":
            return 2 * (self.outputs - self.targets)
        return jnp.broadcast_to(noise[:, :1], noise.shape) if self.mistake == "repeated sampling" else noise


MISTAKES = {
    "factor 2": r"`Squared.ggn_product` is wrong: it is not the Hessian of `value` times a vector: off by",
    "shape of a factor": r"`Squared.ggn_factor` is wrong.*must return an array like the outputs.*\(4, 2, 3\)",
    "wrong transpose": "`Squared.ggn_factor_transpose` is wrong: it is not adjoint to `ggn_factor`",
    "half a factor": r"`Squared.ggn_factor` is wrong: There is none",
    "mixes examples": "`Squared.losses` is wrong: it is not a function of its own example and position only: off by",
    "mixes positions": "`Squared.losses` is wrong",
    "forgets the examples": r"`Squared.losses` is wrong: it must lead with the 4 examples, but is of shape \(\)",
    "wrong variance": r"`Squared.sampled_gradient` is wrong: the second moment of its draws is .* but should be",
    "biased sampling": "`Squared.sampled_gradient` is wrong: the mean of its draws is",
    "given targets": "`Squared.sampled_gradient` is wrong: the mean",
    "repeated sampling": "`Squared.sampled_gradient` is wrong: the second moment",
}


def squared(mistake):
    return Squared(outputs=random(1, 4, 2, 3), targets=random(2, 4, 2, 3), weighting=kfax.Weighting(), mistake=mistake)


@grid(mistake=MISTAKES)
def test_mistakes_are_found(mistake):
    loss = squared(mistake)
    with pytest.raises(ValueError, match=MISTAKES[mistake]):
        kfax.check_loss(loss, key=KEY)


def test_without_a_mistake():
    loss = squared("none")
    assert kfax.check_loss(loss, key=KEY) == ()


class Apart(kfax.Loss):
    """A loss whose two matrices differ, with a mistake in one method."""

    outputs: jax.Array
    weighting: kfax.Weighting
    mistake: str = eqx.field(static=True)

    def losses(self):
        return self.outputs**2 / 2

    def ggn_factor(self, vector):
        return 1.01 * vector if self.mistake == "ggn_factor" else vector

    def ggn_factor_transpose(self, vector):
        return 1.01 * vector if self.mistake == "ggn_factor_transpose" else self.ggn_factor(vector)

    def ggn_product(self, vector):
        return 1.01 * vector if self.mistake == "ggn_product" else vector

    def fisher_factor(self, vector):
        return 2.1 * vector if self.mistake == "sampled_gradient" else 2 * vector

    def fisher_factor_transpose(self, vector):
        return 2 * vector.at[0].mul(1.0 + (self.mistake == "fisher_factor_transpose"))

    def sampled_gradient(self, key):
        return 2 * jax.random.normal(key, self.outputs.shape)


@grid(method=["ggn_factor", "ggn_factor_transpose", "ggn_product", "fisher_factor_transpose"])
def test_the_method_that_is_wrong_is_named(method):
    with pytest.raises(ValueError, match=rf"`Apart.{method}` is wrong"):
        kfax.check_loss(Apart(outputs=random(1, 4, 3), weighting=kfax.Weighting(), mistake=method), key=KEY)


def test_a_factor_without_its_transpose_is_found():
    class Half(Apart):
        def ggn_factor_transpose(self, vector):
            raise ValueError("There is none.")

    with pytest.raises(ValueError, match="`Half.ggn_factor` is wrong: either it or its transpose raises"):
        kfax.check_loss(Half(outputs=random(1, 4, 3), weighting=kfax.Weighting(), mistake="none"), key=KEY)


def test_different_matrices_pass_their_check():
    loss = Apart(outputs=random(1, 4, 3), weighting=kfax.Weighting(), mistake="none")
    assert kfax.check_loss(loss, key=KEY) == ()


def test_negative_curvature_is_reported():
    made = kfax.function_loss(lambda f: jnp.sum(f**3), random(1, 4, 3))
    with pytest.raises(ValueError, match=r"`FunctionLoss.ggn_factor` is wrong: there is none.*negative curvature, -"):
        kfax.check_loss(made, key=KEY)


def test_half_precision_cannot_be_checked():
    f = jnp.ones((4, 2, 3))
    made = kfax.squared_error(f.astype(jnp.bfloat16), f)
    with pytest.raises(ValueError, match="float32 or float64 outputs, to tell errors from rounding, got bfloat16"):
        kfax.check_loss(made, key=KEY)


def test_a_method_that_fails_is_not_one_without_an_answer():
    class Broken(kfax.NaturalLoss):
        outputs: jax.Array
        weighting: kfax.Weighting

        def losses(self):
            return self.outputs**2

        def factor(self, vector):
            return jnp.einsum("nij,nj->ni", vector, vector)

        def factor_transpose(self, vector):
            return self.factor(vector)

        def sampled_gradient(self, key):
            return 2**0.5 * jax.random.normal(key, self.outputs.shape)

    with pytest.raises(ValueError, match="`Broken.ggn_factor_transpose` is wrong"):
        kfax.check_loss(Broken(outputs=random(1, 6, 3), weighting=kfax.Weighting()), key=KEY)

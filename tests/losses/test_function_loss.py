"""Losses by automatic differentiation: of the matrix that the function given has, and of its arguments."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close, random

import kfax


KEY = jax.random.key(0)
F = jnp.ones((4, 2, 3))


def exponential(f, y):
    """Waiting times y with the rates f > 0: neither defined nor differentiable at zero."""
    return jnp.sum(f * y - jnp.log(f))


@grid(thin=2, event_ndim=[0, 1, 2])
def test_axes_of_an_event(event_ndim):
    """The last axes are the function's, those before are positions."""
    f, y = random(1, 5, 2, 3), random(2, 5, 2, 3)
    places = f.shape[: 3 - event_ndim]

    def one(f, y):
        return jnp.sum((f - y) ** 4) + jnp.sum(f) ** 2

    made = kfax.function_loss(one, f, y, event_ndim=event_ndim)
    mapped = one
    for _ in places:
        mapped = jax.vmap(mapped)
    assert_close(made.losses(), mapped(f, y))
    assert_close(made.value(), mapped(f, y).sum() / 5)
    hessian = jax.hessian(lambda flat: mapped(flat.reshape(f.shape), y).sum())(f.reshape(-1))
    basis = jnp.eye(f.size).reshape(-1, *f.shape)
    factor = jax.vmap(made.ggn_factor)(basis).reshape(f.size, -1).T
    assert_close(factor @ factor.T, hessian)
    assert_close(jax.vmap(made.ggn_factor_transpose)(basis).reshape(f.size, -1).T, factor.T)
    assert_close(jax.vmap(made.ggn_product)(basis).reshape(f.size, -1).T, hessian)
    average = kfax.function_loss(one, f, y, event_ndim=event_ndim, mean_over_positions=True)
    assert_close(average.value(), mapped(f, y).mean())


def test_agrees_with_the_losses_written_by_hand():
    f, y = random(1, 5, 2, 4), random(2, 5, 2, 4)
    weights, mask = jnp.arange(5.0), jax.random.bernoulli(KEY, 0.7, (5, 2))
    hand = kfax.squared_error(f, y, weights=weights, mask=mask)

    def one(f, y):
        return jnp.sum((f - y) ** 2)

    for event_ndim in (0, 1):
        made = kfax.function_loss(one, f, y, event_ndim=event_ndim, weights=weights, mask=mask)
        assert_close(made.value(), hand.value())
        assert_close(made.weigh(made.gradient()), hand.weigh(hand.gradient()))
        assert_close(made.weigh(made.ggn_factor(y)), hand.weigh(hand.ggn_factor(y)))
        assert_close(made.weigh(made.ggn_product(y)), hand.weigh(hand.ggn_product(y)))


def test_data_may_be_several_and_pytrees():
    f, y, scale = random(1, 5, 3), random(2, 5, 3), jnp.arange(1.0, 6)

    def one(f, targets, label, scale):
        return scale * jnp.sum((f - targets["y"]) ** 2) + f[label] ** 2

    label = jnp.array([0, 1, 2, 0, 1])
    made = kfax.function_loss(one, f, {"y": y}, label, scale)
    expected = scale * jnp.sum((f - y) ** 2, 1) + f[jnp.arange(5), label] ** 2
    assert_close(made.value(), expected.mean())
    assert_close(kfax.function_loss(lambda f: jnp.sum(f**2), f).value(), jnp.sum(f**2) / 5)


def test_negative_curvature_is_left_out():
    f = jnp.array([[0.5, -2.0], [1.0, 3.0]])
    made = kfax.function_loss(lambda f: jnp.sum(f**3), f)
    v = random(3, 2, 2)
    assert_close(made.ggn_product(v), 6 * jnp.maximum(f, 0) * v)
    assert_close(made.ggn_factor(made.ggn_factor_transpose(v)), 6 * jnp.maximum(f, 0) * v)


def test_sizes_above_max_dim_have_products_only():
    f = random(1, 3, 300)
    made = kfax.function_loss(lambda f: jnp.sum(f**2) + jnp.sum(f) ** 2, f)
    assert_close(made.ggn_product(f), 2 * f + 2 * jnp.sum(f, axis=1, keepdims=True))
    for method in (made.ggn_factor, made.ggn_factor_transpose):
        advice = r"(?s)size 300 .*max_dim=256.*smaller `event_ndim`.*EmpiricalFisher.*`sample=`.*ImplicitExactCurvature"
        with pytest.raises(ValueError, match=advice):
            method(f)
    raised = kfax.function_loss(lambda f: jnp.sum(f**2) + jnp.sum(f) ** 2, f, max_dim=300)
    assert_close(raised.ggn_factor(raised.ggn_factor_transpose(f)), made.ggn_product(f))


def test_the_function_may_close_over_what_is_differentiated():
    """As `kfax` does it: the loss leaves the function in which it was made, and is differentiated afterwards."""
    f, y = random(1, 5, 3), random(2, 5, 3)

    def make(temperature):
        return kfax.function_loss(lambda f, y: jnp.sum((f * temperature - y) ** 2), f * temperature, y)

    loss, pullback = eqx.filter_vjp(make, jnp.array(2.0))
    (gradient,) = pullback(eqx.filter_grad(lambda loss: loss.value())(loss))
    expected = jax.grad(lambda t: jnp.sum((f * t * t - y) ** 2) / 5)(2.0)
    assert_close(gradient, expected)


@grid(masked=["some", "all", "none of the first"])
def test_what_is_masked_may_be_outside_of_the_domain(masked):
    """The function is never seen where it is not defined: at NaN, and at zero."""
    mask = {
        "some": jnp.array([[True, False], [True, True], [False, False]]),
        "all": jnp.zeros((3, 2), bool),
        "none of the first": jnp.array([False, True, True]),
    }[masked]
    full = jnp.broadcast_to(mask.reshape(3, -1), (3, 2))[..., None]
    f, y = 0.5 + random(1, 3, 2, 4) ** 2, random(2, 3, 2, 4) ** 2

    def value(f, y, scale):
        return kfax.function_loss(lambda f, y: scale * exponential(f, y), f, y, mask=mask).value()

    clean = jax.value_and_grad(value, (0, 1, 2))(f, y, jnp.array(2.0))
    for bad in (jnp.nan, 0.0, -1.0):
        arrays = jnp.where(full, f, bad), jnp.where(full, y, jnp.nan)
        dirty = jax.value_and_grad(value, (0, 1, 2))(*arrays, jnp.array(2.0))
        if masked == "all":  # nothing is left that the function could be called with instead
            assert dirty[0] == 0 and not jnp.any(dirty[1][0]) and not jnp.any(dirty[1][1])
        else:
            assert_close(dirty, clean)
        made = kfax.function_loss(exponential, *arrays, mask=mask)
        for result in (made.ggn_factor(f), made.ggn_factor_transpose(f), made.ggn_product(f)):
            assert jnp.all(jnp.isfinite(result))


def test_sampling_by_the_function_given():
    def sample(key, f):
        return jax.random.exponential(key, f.shape) / f

    f = 0.5 + random(1, 4, 2, 3) ** 2
    made = kfax.function_loss(exponential, f, f, sample=sample)
    draws = jax.vmap(made.sampled_gradient)(jax.random.split(KEY, 20_000))
    # Mean zero, and the second moment of an exponential distribution.
    assert jnp.all(jnp.abs(draws.mean(0)) <= 5 * draws.std(0) / math.sqrt(20_000))
    squares = draws**2
    assert jnp.all(jnp.abs(squares.mean(0) - 1 / f**2) <= 5 * squares.std(0) / math.sqrt(20_000))
    pairs = kfax.function_loss(
        lambda f, a, b: jnp.sum((f - a) ** 2) * b, f, f, f[..., 0], sample=lambda key, f: (f, f[0])
    )
    assert_close(pairs.sampled_gradient(KEY), jnp.zeros_like(f))


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("takes the model's outputs as an array", lambda: kfax.function_loss(exponential, F.astype(int), F)),
        (r"event_ndim=3.*got \(4, 2, 3\)", lambda: kfax.function_loss(exponential, F, F, event_ndim=3)),
        ("single output use `event_ndim=0`", lambda: kfax.function_loss(exponential, F[:, 0, 0], F[:, 0, 0])),
        (
            r"lead with the axes.*\(4, 2\), got one of shape \(4, 3\)",
            lambda: kfax.function_loss(exponential, F, F[:, 0]),
        ),
        ("must return a real number for outputs of shape", lambda: kfax.function_loss(lambda f: f, F)),
        ("must return a real number for outputs of shape", lambda: kfax.function_loss(lambda f: 1, F)),
        ("must be boolean", lambda: kfax.function_loss(exponential, F, F, mask=jnp.ones((4, 2)))),
        (
            r"\(4, 2\) or \(4,\), got bool",
            lambda: kfax.function_loss(exponential, F, F, mask=jnp.ones((4, 2, 3), bool)),
        ),
        ("one number for each example", lambda: kfax.function_loss(exponential, F, F, weights=jnp.ones((4, 2)))),
        (
            r"`sample` of `function_loss` must return.*\(3,\).*returned",
            lambda: kfax.function_loss(exponential, F, F, sample=lambda key, f: f[0]),
        ),
        ("give it `sample=`", lambda: kfax.function_loss(exponential, F, F).sampled_gradient(KEY)),
        (r"Use `kfax.ExactGGN\(\)`", lambda: kfax.function_loss(exponential, F, F).fisher_factor(F)),
        (
            r"Use `kfax.SampledFisher\(\)`",
            lambda: kfax.function_loss(exponential, F, F, sample=lambda k, f: f).fisher_factor_transpose(F),
        ),
    ],
)
def test_bad_arguments(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_nonconvex_function_has_one_matrix():
    """The positive part of its Hessian, in products, factors and blocks alike."""
    f = random(1, 6, 3)

    def wavy(f):
        return jnp.sum(jnp.cos(2 * f)) + 0.1 * jnp.sum(f) ** 2

    made = kfax.function_loss(wavy, f)
    hessians = jax.vmap(jax.hessian(wavy))(f)
    values, vectors = jnp.linalg.eigh(hessians)
    assert jnp.min(values) < -1
    positive = jnp.einsum("nij,nj,nkj->nik", vectors, jnp.maximum(values, 0), vectors)
    u = random(2, 6, 3)
    expected = jnp.einsum("nij,nj->ni", positive, u)
    assert_close(made.ggn_product(u), expected)
    assert_close(made.ggn_factor(made.ggn_factor_transpose(u)), expected)
    with pytest.raises(ValueError, match="`FunctionLoss.ggn_factor` is wrong: there is none.*negative curvature, -"):
        kfax.check_loss(made, key=KEY)

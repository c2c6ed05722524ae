"""Sums and second moments of patches equal those of explicit patches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfax._operations import Convolution, patch_moments, Windows


# kernel, stride, dilation, padding, and other fields
SIZES = (9, 8, 7)
CASES = {
    "same": ((3, 3), (1, 1), (1, 1), "SAME", {}),
    "uneven": ((3, 2), (1, 1), (1, 1), ((0, 2), (1, 0)), {}),
    "large padding": ((2, 2), (1, 1), (1, 1), ((3, 4), (2, 3)), {}),
    "negative padding": ((3, 3), (1, 1), (1, 1), ((-1, -2), (-1, 1)), {}),
    "dilated": ((3, 2), (1, 1), (2, 3), ((2, 2), (1, 2)), {}),
    "dilated and odd": ((3, 3), (1, 1), (2, 2), ((1, 3), (3, 1)), {}),
    "dilated too far": ((3, 3), (1, 1), (4, 5), "SAME", {}),
    "strided once": ((3, 3), (1, 2), (1, 1), ((1, 1), (1, 1)), {}),
    "strided and dilated": ((2, 3), (2, 3), (3, 1), ((1, 2), (-1, 3)), {}),
    "patches apart": ((2, 2), (3, 4), (1, 1), "VALID", {}),
    "one tap": ((1, 1), (1, 1), (1, 1), "VALID", {}),
    "5x5": ((5, 5), (1, 1), (1, 1), "SAME", {}),
    "edge": ((3, 3), (1, 1), (1, 1), ((1, 1), (2, 1)), {"pad_mode": "edge"}),
    "spread": ((3, 3), (1, 1), (1, 1), ((2, 1), (1, -1)), {"spread": (2, 3)}),
    "wrapped and spread": ((3, 2), (1, 1), (1, 2), ((1, 0), (0, 1)), {"spread": (2, 2), "wrap": ((1, 1), (0, 2))}),
    "1d": ((3,), (1,), (1,), "SAME", {}),
    "1d long": ((9,), (1,), (1,), ((8, 8),), {}),
    "3d": ((3, 2, 3), (1, 1, 1), (1, 1, 2), "SAME", {}),
    "3d cube": ((2, 2, 2), (1, 1, 1), (1, 1, 1), ((1, 0), (0, 0), (0, 1)), {}),
    "3d strided": ((2, 3, 2), (2, 1, 1), (1, 1, 1), ((1, 0), (1, 1), (0, 1)), {}),
}
ON_ALL_AXES = ["same", "negative padding", "dilated and odd", "3d cube"]


def operation(case, num_groups=1):
    kernel, stride, dilation, padding, others = CASES[case]
    weight = jnp.zeros((4, 4 // num_groups, *kernel))
    return Convolution(weight, None, Windows(kernel, stride, dilation, padding, **others), num_groups)


def data(key, convolution):
    sizes = SIZES[: len(convolution.windows.kernel)]
    keys = jax.random.split(key)
    return jax.random.normal(keys[0], (3, 2, 4, *sizes)), jax.random.normal(keys[1], (3, 2))


@eqx.filter_jit
def computed(convolution, x, weights, dtype=jnp.float64):
    moment = convolution.input_moment(x, weights, dtype, diagonal=False)
    diagonal = convolution.input_moment(x, weights, dtype, diagonal=True)
    return moment, diagonal, convolution.input_sums(x, weights, dtype)


def expected(convolution, x, weights):
    patches = np.asarray(eqx.filter_jit(convolution.windows.patches)(x), np.float64)
    n, p, taps, channels, num_patches = patches.shape
    groups = convolution.num_groups
    rows = patches.reshape(n, p, taps, groups, channels // groups, num_patches)
    rows = np.transpose(rows, (3, 0, 1, 5, 4, 2)).reshape(groups, n, p * num_patches, -1)
    weighted = rows if weights is None else rows * np.repeat(weights, num_patches, axis=1)[..., None]
    moment, sums = np.einsum("gnra,gnrb->gab", weighted, rows), np.sum(weighted, axis=2)
    if groups == 1:
        moment, sums = moment[0], sums[0]
    return moment, np.diagonal(moment, axis1=-2, axis2=-1), sums


def assert_close(value, reference, tolerance):
    assert value.shape == reference.shape
    assert np.max(np.abs(value - reference)) <= tolerance * np.max(np.abs(reference))


def assert_equals_explicit_patches(convolution, x, weights):
    for value, reference in zip(computed(convolution, x, weights), expected(convolution, x, weights), strict=True):
        assert_close(value, reference, 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_equals_explicit_patches(case, key):
    convolution = operation(case)
    x, weights = data(key, convolution)
    assert_equals_explicit_patches(convolution, x, weights)


@pytest.mark.parametrize("case, num_groups", [("same", 2), ("strided once", 4), ("1d", 4), ("edge", 2)])
def test_groups(case, num_groups, key):
    convolution = operation(case, num_groups)
    x, weights = data(key, convolution)
    assert_equals_explicit_patches(convolution, x, None if num_groups == 2 else weights)


@pytest.mark.parametrize("case", ON_ALL_AXES)
def test_lags_of_all_axes(case, key, monkeypatch):
    """As with many channels."""
    monkeypatch.setattr(patch_moments, "_MIN_PRODUCT", 1)
    convolution = operation(case)
    x, weights = data(key, convolution)
    moment = jax.jit(lambda x: convolution.input_moment(x, weights, x.dtype, diagonal=False))(x)
    assert_close(moment, expected(convolution, x, weights)[0], 1e-12)


def test_accumulates_in_the_given_dtype(key):
    convolution = operation("1d")
    x = data(key, convolution)[0].astype(jnp.bfloat16)
    results = computed(convolution, x, None, jnp.float32)
    for value, reference in zip(results, expected(convolution, x, None), strict=True):
        assert value.dtype == jnp.float32
        assert_close(value, reference, 1e-5)


def test_frozen_weight():
    convolution = Convolution(None, jnp.zeros((4, 1)), operation("1d").windows, 2)
    x = jnp.ones((3, 2, 4, 9))
    rows = 3 * 2 * convolution.num_positions(x)
    assert_close(convolution.input_moment(x, None, x.dtype, diagonal=False), jnp.full((2, 1, 1), 1.0 * rows), 0)
    assert_close(convolution.input_moment(x, None, x.dtype, diagonal=True), jnp.full((2, 1), 1.0 * rows), 0)
    assert convolution.input_sums(x, None, x.dtype).shape == (2, 3, 0)


def test_program_size():
    """The number of products grows with the number of taps along one axis, not with that of pairs of taps."""
    convolution = operation("5x5")
    x = jnp.zeros((3, 2, 4, 9, 8))
    program = jax.make_jaxpr(lambda x: convolution.input_moment(x, None, x.dtype, diagonal=False))(x)
    assert str(program).count("dot_general") <= 3 * 5

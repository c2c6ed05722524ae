"""Values, Hessian factors and sampling of every loss, against automatic differentiation of plain formulas."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import grid, LOSSES
from helpers import assert_close
from reference import output_hessians, signs

import kfax


SHAPES = {"vector": (5, 3), "sequence": (5, 2, 3), "image": (5, 2, 2, 3)}
SCALES = {"plain": {}, "weights": {"weights": jnp.array([1.0, 0.5, 0.0, 2.0, 1.5])}}


def make(loss, shape, **options):
    case = LOSSES[loss]
    outputs = jax.random.normal(jax.random.key(1), SHAPES[shape]) * 2
    targets = case.targets(jax.random.key(2), outputs.shape)
    return case.make(outputs, targets, **options), case.one, outputs, targets


def position_mask(shape):
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, SHAPES[shape][:-1])
    return mask.at[1].set(False)  # one example is masked throughout


def weighted_mean(one, outputs, targets, weights, mask=None):
    """The loss written out, with masked positions dropped by Python."""
    total = 0.0
    for n in range(len(outputs)):
        if mask is None:
            total = total + weights[n] * one(outputs[n], targets[n])
            continue
        flat_f, flat_y = outputs[n].reshape(-1, outputs.shape[-1]), targets[n].reshape(mask[n].size, -1)
        flat_y = flat_y[:, 0] if targets.ndim < outputs.ndim else flat_y
        for f, y, keep in zip(flat_f, flat_y, mask[n].reshape(-1), strict=True):
            total = total + (weights[n] * one(f[None], y[None]) if keep else 0.0)
    if mask is not None:
        weights = weights * jnp.stack([m.any() for m in mask])
    return total / jnp.sum(weights)


@grid(loss=LOSSES, shape=SHAPES, scale=SCALES, masked=[False, True])
def test_value_and_gradient(loss, shape, scale, masked):
    mask = position_mask(shape) if masked else None
    weights = SCALES[scale].get("weights", jnp.ones(5))
    made, one, outputs, targets = make(loss, shape, mask=mask, **SCALES[scale])
    assert_close(made.value(), weighted_mean(one, outputs, targets, weights, mask))

    def value(f):
        return LOSSES[loss].make(f, targets, mask=mask, **SCALES[scale]).value()

    expected = jax.grad(lambda f: weighted_mean(one, f, targets, weights, mask))(outputs)
    assert_close(jax.grad(value)(outputs), expected)


@grid(loss=LOSSES, shape=SHAPES, scale=SCALES, masked=[False, True])
def test_factor_is_a_square_root_of_the_hessian(loss, shape, scale, masked):
    mask = position_mask(shape) if masked else None
    made, _, outputs, targets = make(loss, shape, mask=mask, **SCALES[scale])
    size = outputs.size

    def value(flat):
        return LOSSES[loss].make(flat.reshape(outputs.shape), targets, mask=mask, **SCALES[scale]).value()

    hessian = jax.hessian(value)(outputs.reshape(-1)) * len(outputs)
    basis = jnp.eye(size).reshape(size, *outputs.shape)
    columns = jax.vmap(made.multiply_factor)(basis).reshape(size, size).T
    rows = jax.vmap(made.multiply_factor_transpose)(basis).reshape(size, size).T
    assert_close(columns @ columns.T, hessian)
    assert_close(rows, columns.T)


@grid(loss=LOSSES, shape=["vector", "sequence"])
def test_mean_over_positions_averages_over_all_that_count(loss, shape):
    mask = position_mask(shape)
    weights = SCALES["weights"]["weights"]
    made, *_ = make(loss, shape, mask=mask, weights=weights, mean_over_positions=True)
    summed, *_ = make(loss, shape, mask=mask, weights=weights)
    used = weights.reshape(-1, *(1,) * (mask.ndim - 1)) * mask
    counted = jnp.sum(weights * mask.reshape(5, -1).any(1))
    assert_close(made.value() * jnp.sum(used), summed.value() * counted)


def test_losses_agree_with_optax():
    f, labels = jax.random.normal(jax.random.key(1), (7, 4)), jnp.array([0, 1, 2, 3, 3, 2, 1])
    targets = jax.random.uniform(jax.random.key(2), (7, 4))
    one_hot = jax.nn.one_hot(labels, 4)
    softmax = optax.softmax_cross_entropy_with_integer_labels(f, labels).mean()
    assert_close(kfax.softmax_cross_entropy(f, labels).value(), softmax)
    assert_close(kfax.softmax_cross_entropy(f, one_hot).value(), softmax)
    assert_close(kfax.softmax_cross_entropy(f, one_hot.astype(int)).value(), softmax)
    sigmoid = optax.sigmoid_binary_cross_entropy(f, targets).sum(1).mean()
    assert_close(kfax.sigmoid_cross_entropy(f, targets).value(), sigmoid)
    assert_close(kfax.squared_error(f, targets).value(), optax.squared_error(f, targets).sum(1).mean())
    assert_close(kfax.squared_error(f[:, 0], targets[:, 0]).value(), ((f - targets)[:, 0] ** 2).mean())


def test_squared_error_has_hessian_two():
    made, *_ = make("squared", "vector")
    v = jax.random.normal(jax.random.key(5), (5, 3))
    assert_close(made.multiply_factor(made.multiply_factor_transpose(v)), 2 * v)


@grid(loss=["softmax", "sigmoid"])
def test_fisher_is_the_hessian_when_all_labels_are_enumerated(loss):
    """Exact case 12: the second moment of the gradient over the model's own distribution of targets."""
    _, one, outputs, targets = make(loss, "vector")
    hessians = output_hessians(one, outputs, targets)
    for f, hessian in zip(outputs, hessians, strict=True):
        if loss == "softmax":
            labels, probabilities = jnp.arange(3), jax.nn.softmax(f)
        else:
            labels = (signs(3) + 1) / 2
            p = jax.nn.sigmoid(f)
            probabilities = jnp.prod(jnp.where(labels == 1, p, 1 - p), axis=1)
        gradients = jnp.stack([jax.grad(lambda v, y=y: one(v[None], y[None]))(f) for y in labels])
        assert_close(jnp.einsum("k,ki,kj->ij", probabilities, gradients, gradients), hessian)


@grid(loss=LOSSES, scale=SCALES)
def test_sampled_cotangents_have_mean_zero_and_the_hessian_as_second_moment(loss, scale):
    made, _, outputs, _ = make(loss, "vector", **SCALES[scale])
    number = 20_000
    draws = jax.vmap(made.sampled_cotangent)(jax.random.split(jax.random.key(6), number))
    basis = jnp.eye(3)
    for n in range(len(outputs)):
        columns = jnp.stack([made.multiply_factor(jnp.broadcast_to(e, (5, 3)))[n] for e in basis], axis=1)
        products = jnp.einsum("ki,kj->kij", draws[:, n], draws[:, n])
        # Five standard errors of a mean of `number` draws: 5 x 3 x 3 entries for each of six cases.
        errors = 5 * products.std(0) / jnp.sqrt(number) + 1e-12
        assert jnp.all(jnp.abs(products.mean(0) - columns @ columns.T) <= errors)
        assert jnp.all(jnp.abs(draws[:, n].mean(0)) <= 5 * draws[:, n].std(0) / jnp.sqrt(number) + 1e-12)


@grid(loss=LOSSES)
def test_masked_nans_have_no_effect(loss):
    mask = position_mask("sequence")
    case = LOSSES[loss]
    _, _, outputs, targets = make(loss, "sequence")
    bad = jnp.where(mask[..., None], outputs, jnp.nan)
    bad_targets = jnp.where(mask, targets, -100) if loss == "softmax" else jnp.where(mask[..., None], targets, jnp.nan)
    clean, dirty = case.make(outputs, targets, mask=mask), case.make(bad, bad_targets, mask=mask)
    assert_close(dirty.value(), clean.value())
    gradient = jax.grad(lambda f: case.make(f, bad_targets, mask=mask).value())(bad)
    assert_close(gradient, jax.grad(lambda f: case.make(f, targets, mask=mask).value())(outputs))
    v = jnp.ones((5, 2, 3))
    assert_close(dirty.multiply_factor(v), clean.multiply_factor(v))
    assert jnp.all(jnp.isfinite(dirty.sampled_cotangent(jax.random.key(0))))


@grid(loss=LOSSES)
def test_dropping_masked_examples_changes_nothing(loss):
    case = LOSSES[loss]
    _, _, outputs, targets = make(loss, "vector")
    keep = jnp.array([True, False, True, True, False])
    masked, dropped = case.make(outputs, targets, mask=keep), case.make(outputs[keep], targets[keep])
    assert_close(masked.value(), dropped.value())
    # Cotangents are relative to the number of examples, which differs.
    v = jnp.ones((5, 3))
    assert_close(masked.multiply_factor(v)[keep] / jnp.sqrt(5 / 3), dropped.multiply_factor(v[keep]))
    assert_close(masked.example_weights(), keep * 5 / 3)


def test_nothing_counts_nothing():
    made, *_ = make("softmax", "vector", mask=jnp.zeros(5, bool))
    assert made.value() == 0


@grid(loss=LOSSES)
def test_a_multiple_of_a_loss(loss):
    made, *_ = make(loss, "vector")
    v = jnp.ones((5, 3))
    for scaled in (4 * made, made * 4.0, made * jnp.asarray(4)):
        assert_close(scaled.value(), 4 * made.value())
        assert_close(scaled.multiply_factor(v), 2 * made.multiply_factor(v))
    gradient = jax.grad(lambda c: (made * c).value())(1.0)
    assert_close(gradient, made.value())


def test_labels_out_of_range_give_nan():
    f = jnp.zeros((2, 3))
    for label in (-1, 3):
        assert jnp.isnan(kfax.softmax_cross_entropy(f, jnp.array([0, label])).value())


def test_distribution_names():
    assert kfax.categorical is kfax.softmax_cross_entropy
    assert kfax.multi_bernoulli is kfax.sigmoid_cross_entropy
    assert kfax.normal is kfax.squared_error


def test_half_precision_outputs():
    f = jax.random.normal(jax.random.key(1), (7, 4)).astype(jnp.bfloat16)
    made = kfax.softmax_cross_entropy(f, jnp.zeros(7, int))
    assert made.value().dtype == jnp.float32
    assert made.multiply_factor(f).dtype == jnp.bfloat16


def bad(match, function, *arguments, **options):
    return pytest.param(match, lambda: function(*arguments, **options), id=match[:40])


F = jnp.zeros((4, 3))


@pytest.mark.parametrize(
    ("match", "call"),
    [
        bad("got int64.*argmax", kfax.softmax_cross_entropy, jnp.zeros((4, 3), int), jnp.zeros(4, int)),
        bad("got int64.*swapped", kfax.squared_error, jnp.zeros(4, int), jnp.zeros(4)),
        bad("got complex128", kfax.squared_error, jnp.zeros(4, complex), jnp.zeros(4)),
        bad("single number.*vmap", kfax.sigmoid_cross_entropy, jnp.zeros(()), jnp.zeros(())),
        bad(r"\(n, ..., classes\).*sigmoid_cross_entropy", kfax.softmax_cross_entropy, jnp.zeros(4), jnp.zeros(4, int)),
        bad(r"labels.*\(4,\), got \(3,\)", kfax.softmax_cross_entropy, F, jnp.zeros(3, int)),
        bad("labels.astype", kfax.softmax_cross_entropy, F, jnp.zeros(4)),
        bad(r"shape of the outputs, \(4, 3\), got \(4,\)", kfax.squared_error, F, jnp.zeros(4)),
        bad("one number for each example.*use `mask`", kfax.squared_error, F, F, weights=jnp.ones((4, 3))),
        bad("must be boolean", kfax.squared_error, F, F, mask=jnp.ones(4)),
        bad(r"or \(4,\), got bool of shape \(3,\)", kfax.squared_error, F, F, mask=jnp.ones(3, bool)),
    ],
)
def test_bad_arguments(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_losses_are_pytrees():
    made, *_ = make("softmax", "sequence", mask=position_mask("sequence"))
    doubled = jax.jit(lambda loss: (2 * loss).value())(made)
    assert_close(doubled, 2 * made.value())
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(made))

"""Values, Hessian factors and sampling of every loss, against automatic differentiation of plain formulas."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import ALL_LOSSES, grid
from helpers import assert_close
from reference import gaussian_nll_fisher, output_hessians

import kfax


SHAPES = {"vector": (5, 4), "sequence": (5, 2, 4), "image": (5, 2, 2, 4)}
GGN_LOSSES = [name for name, case in ALL_LOSSES.items() if case.has_ggn]
FISHER_LOSSES = [name for name, case in ALL_LOSSES.items() if case.has_fisher]
SAMPLED_LOSSES = [name for name, case in ALL_LOSSES.items() if case.has_samples]
SCALES = {"plain": {}, "weights": {"weights": jnp.array([1.0, 0.5, 0.0, 2.0, 1.5])}}


def rarer(_loss, shape, scale, masked):
    """What is left to the slow tests: positions with weights only, or with a mask only; plain images."""
    return shape != "vector" and ((scale == "weights") != masked or (shape == "image" and not masked))


def make(loss, shape, **options):
    case = ALL_LOSSES[loss]
    outputs = jax.random.normal(jax.random.key(1), SHAPES[shape])
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


@grid(slow=rarer, thin=3, loss=ALL_LOSSES, shape=SHAPES, scale=SCALES, masked=[False, True])
def test_value_and_gradient(loss, shape, scale, masked):
    mask = position_mask(shape) if masked else None
    weights = SCALES[scale].get("weights", jnp.ones(5))
    made, one, outputs, targets = make(loss, shape, mask=mask, **SCALES[scale])
    assert_close(made.value(), weighted_mean(one, outputs, targets, weights, mask))

    def value(f):
        return ALL_LOSSES[loss].make(f, targets, mask=mask, **SCALES[scale]).value()

    expected = jax.grad(lambda f: weighted_mean(one, f, targets, weights, mask))(outputs)
    assert_close(jax.grad(value)(outputs), expected)


@grid(loss=ALL_LOSSES, shape=["vector", "sequence"])
def test_gradient_is_that_of_each_example_without_weights(loss, shape):
    made, one, outputs, targets = make(loss, shape, weights=SCALES["weights"]["weights"], mean_over_positions=True)
    assert_close((7 * made).gradient(), jax.jit(jax.vmap(jax.grad(one)))(outputs, targets))


def matrices(made, names):
    """What linear methods do to the raveled outputs: one matrix for each of them, between weights."""
    basis = jnp.eye(made.outputs.size).reshape(-1, *made.outputs.shape)

    @jax.jit
    def images(made):
        weighed = jax.vmap(made.weigh)
        calls = {
            "factor": lambda method: weighed(jax.vmap(method)(basis)),
            "factor_transpose": lambda method: jax.vmap(method)(weighed(basis)),
            "product": lambda method: weighed(jax.vmap(method)(weighed(basis))),
        }
        return [calls[name.partition("_")[2]](getattr(made, name)).reshape(len(basis), -1).T for name in names]

    return images(made)


@grid(slow=rarer, thin=2, loss=GGN_LOSSES, shape=SHAPES, scale=SCALES, masked=[False, True])
def test_factor_is_a_square_root_of_the_hessian(loss, shape, scale, masked):
    mask = position_mask(shape) if masked else None
    made, _, outputs, targets = make(loss, shape, mask=mask, **SCALES[scale])

    def value(flat):
        return ALL_LOSSES[loss].make(flat.reshape(outputs.shape), targets, mask=mask, **SCALES[scale]).value()

    hessian = jax.jit(jax.hessian(value))(outputs.reshape(-1)) * len(outputs)
    factor, transpose, product = matrices(made, ["ggn_factor", "ggn_factor_transpose", "ggn_product"])
    assert_close(factor @ factor.T, hessian)
    assert_close(transpose, factor.T)
    assert_close(product, hessian)


@grid(loss=FISHER_LOSSES, scale=SCALES)
def test_fisher_factor_is_a_square_root_of_the_fisher_information(loss, scale):
    made, one, outputs, targets = make(loss, "vector", **SCALES[scale])
    if loss == "gaussian_nll":
        blocks = jax.vmap(gaussian_nll_fisher)(outputs)
    else:
        blocks = output_hessians(one, outputs, targets)
    weights = SCALES[scale].get("weights", jnp.ones(5))
    expected = jax.scipy.linalg.block_diag(*(blocks * (weights / weights.mean())[:, None, None]))
    factor, transpose = matrices(made, ["fisher_factor", "fisher_factor_transpose"])
    assert_close(factor @ factor.T, expected)
    assert_close(transpose, factor.T)


@grid(loss=ALL_LOSSES, shape=["vector", "sequence"])
def test_mean_over_positions_averages_over_all_that_count(loss, shape):
    mask = position_mask(shape)
    weights = SCALES["weights"]["weights"]
    made, *_ = make(loss, shape, mask=mask, weights=weights, mean_over_positions=True)
    summed, *_ = make(loss, shape, mask=mask, weights=weights)
    used = weights.reshape(-1, *(1,) * (mask.ndim - 1)) * mask
    counted = jnp.sum(weights * mask.reshape(5, -1).any(1))
    assert_close(made.value() * jnp.sum(used), summed.value() * counted)
    assert_close(made.total_weight(), jnp.sum(used))
    assert_close(summed.total_weight(), counted)
    assert made.weighting.scale == 1


@grid(
    thin=2,
    slow=lambda _, weighted, masked, __: weighted != masked,
    loss=ALL_LOSSES,
    weighted=[True, False],
    masked=[True, False],
    average=[False, True],
)
def test_batches_of_a_data_set_average_to_its_loss(loss, weighted, masked, average):
    """However it is shuffled and split into uneven parts, one of which may not count at all."""
    case = ALL_LOSSES[loss]
    outputs = jax.random.normal(jax.random.key(1), (12, 2, 4))
    targets = case.targets(jax.random.key(2), outputs.shape)
    weights = jax.random.uniform(jax.random.key(4), (12,)) if weighted else None
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (12, 2)).at[4:6].set(False) if masked else None
    order = jax.random.permutation(jax.random.key(5), 12)
    whole = case.make(outputs, targets, weights=weights, mask=mask, mean_over_positions=average)
    for bounds in ([0, 12], [0, 2, 7, 12], [0, 1, 2, 4, 5, 10, 11, 12]):
        for permutation in (jnp.arange(12), order):
            total, sum_of_weights = 0.0, 0.0
            for start, stop in itertools.pairwise(bounds):
                part = permutation[start:stop]
                arrays = [None if x is None else x[part] for x in (outputs, targets, weights, mask)]
                batch = case.make(*arrays[:2], weights=arrays[2], mask=arrays[3], mean_over_positions=average)
                total = total + batch.total_weight() * batch.value()
                sum_of_weights = sum_of_weights + batch.total_weight()
            assert_close(total / sum_of_weights, whole.value())
            assert_close(sum_of_weights, whole.total_weight())


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
    v = jax.random.normal(jax.random.key(5), (5, 4))
    assert_close(made.factor(made.factor_transpose(v)), 2 * v)


def test_new_losses_agree_with_scipy():
    """Up to the constants that are left out."""
    f, s = jax.random.normal(jax.random.key(1), (2, 7, 4))
    counts = jax.random.poisson(jax.random.key(2), 2.0, (7, 4))
    constant = jax.scipy.special.gammaln(counts + 1.0).sum(1).mean()
    expected = -jax.scipy.stats.poisson.logpmf(counts, jnp.exp(f)).sum(1).mean()
    assert_close(kfax.poisson_nll(f, counts).value() + constant, expected)
    y = jax.random.normal(jax.random.key(3), (7, 4))
    expected = -jax.scipy.stats.norm.logpdf(y, f, jnp.exp(s / 2)).sum(1).mean()
    assert_close(kfax.gaussian_nll(f, s, y).value() + 2 * jnp.log(2 * jnp.pi), expected)
    single = kfax.gaussian_nll(f[:, 0], s[:, 0], y[:, 0])
    assert single.outputs.shape == (7, 2)
    assert_close(single.value(), kfax.gaussian_nll(f[:, :1], s[:, :1], y[:, :1]).value())


@grid(loss=SAMPLED_LOSSES, scale=SCALES)
def test_sampled_gradients_have_mean_zero_and_the_fisher_information_as_second_moment(loss, scale):
    made, one, outputs, targets = make(loss, "vector", **SCALES[scale])
    if loss == "gaussian_nll":
        fisher = jax.vmap(gaussian_nll_fisher)(outputs)
    else:
        fisher = output_hessians(one, outputs, targets)
    weights = SCALES[scale].get("weights", jnp.ones(5))
    expected = fisher * (weights / weights.mean())[:, None, None]
    number = 20_000
    keys = jax.random.split(jax.random.key(6), number)
    draws = jax.jit(jax.vmap(lambda key: made.weigh(made.sampled_gradient(key))))(keys)
    products = jnp.einsum("kni,knj->knij", draws, draws)
    # Five standard errors of a mean of `number` draws: 5 x 4 x 4 entries for each of twelve cases.
    assert jnp.all(jnp.abs(products.mean(0) - expected) <= 5 * products.std(0) / jnp.sqrt(number) + 1e-12)
    assert jnp.all(jnp.abs(draws.mean(0)) <= 5 * draws.std(0) / jnp.sqrt(number) + 1e-12)


KEYS = {"new": jax.random.key, "raw": jax.random.PRNGKey, "rbg": lambda seed: jax.random.key(seed, impl="rbg")}


@grid(kind=KEYS)
def test_every_kind_of_key_will_do(kind):
    for loss in SAMPLED_LOSSES:
        made, *_ = make(loss, "sequence")
        draws = [made.sampled_gradient(KEYS[kind](seed)) for seed in (0, 0, 1)]
        assert_close(draws[1], draws[0])
        assert not jnp.array_equal(draws[2], draws[0])


@grid(loss=ALL_LOSSES)
def test_masked_nans_have_no_effect(loss):
    mask = position_mask("sequence")
    case = ALL_LOSSES[loss]
    _, _, outputs, targets = make(loss, "sequence")
    bad = jnp.where(mask[..., None], outputs, jnp.nan)
    bad_targets = jnp.where(mask, targets, -100) if targets.ndim == 2 else jnp.where(mask[..., None], targets, jnp.nan)
    clean, dirty = case.make(outputs, targets, mask=mask), case.make(bad, bad_targets, mask=mask)
    assert_close(dirty.value(), clean.value())
    gradient = jax.grad(lambda f: case.make(f, bad_targets, mask=mask).value())(bad)
    assert_close(gradient, jax.grad(lambda f: case.make(f, targets, mask=mask).value())(outputs))
    v = jnp.ones((5, 2, 4))
    assert_close(dirty.weigh(dirty.gradient()), clean.weigh(clean.gradient()))
    if case.has_ggn:
        assert_close(dirty.weigh(dirty.ggn_factor(v)), clean.weigh(clean.ggn_factor(v)))
        assert_close(dirty.weigh(dirty.ggn_product(v)), clean.weigh(clean.ggn_product(v)))
    if case.has_fisher:
        assert_close(dirty.weigh(dirty.fisher_factor(v)), clean.weigh(clean.fisher_factor(v)))
    if case.has_samples:
        assert jnp.all(jnp.isfinite(dirty.sampled_gradient(jax.random.key(0))))


@grid(loss=ALL_LOSSES)
def test_dropping_masked_examples_changes_nothing(loss):
    case = ALL_LOSSES[loss]
    _, _, outputs, targets = make(loss, "vector")
    keep = jnp.array([True, False, True, True, False])
    masked, dropped = case.make(outputs, targets, mask=keep), case.make(outputs[keep], targets[keep])
    assert_close(masked.value(), dropped.value())
    # Cotangents are relative to the number of examples, which differs.
    gradients = masked.weigh(masked.gradient())[keep] / jnp.sqrt(5 / 3)
    assert_close(gradients, dropped.weigh(dropped.gradient()))
    assert_close(masked.example_weights(), keep * 5 / 3)


def test_nothing_counts_nothing():
    made, *_ = make("softmax", "vector", mask=jnp.zeros(5, bool))
    assert made.value() == 0
    assert made.total_weight() == 0


@grid(loss=ALL_LOSSES)
def test_a_multiple_of_a_loss(loss):
    made, *_ = make(loss, "vector")
    v = jnp.ones((5, 4))
    for scaled in (4 * made, made * 4.0, made * jnp.asarray(4)):
        assert_close(scaled.value(), 4 * made.value())
        assert_close(scaled.weigh(v), 2 * made.weigh(v))
        assert_close(scaled.total_weight(), made.total_weight())
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


@grid(loss=ALL_LOSSES)
def test_half_precision_outputs(loss):
    f = jax.random.normal(jax.random.key(1), (7, 4)).astype(jnp.bfloat16)
    case = ALL_LOSSES[loss]
    targets = case.targets(jax.random.key(2), f.shape)

    def run(f):
        made = case.make(f, targets)
        results = [made.gradient()]
        results += [made.ggn_factor(f), made.ggn_factor_transpose(f), made.ggn_product(f)] if case.has_ggn else []
        results += [made.fisher_factor(f), made.fisher_factor_transpose(f)] if case.has_fisher else []
        results += [made.sampled_gradient(jax.random.key(0))] if case.has_samples else []
        return made.value(), [made.weigh(result) for result in results]

    value, results = jax.eval_shape(run, f)
    assert value.dtype == jnp.float32
    assert all(result.dtype == jnp.bfloat16 and result.shape == f.shape for result in results)


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
        bad("got int64", kfax.poisson_nll, jnp.zeros(4, int), jnp.zeros(4)),
        bad(r"`counts` of `poisson_nll`.*\(4, 3\), got \(4,\)", kfax.poisson_nll, F, jnp.zeros(4)),
        bad(r"one shape, got \(4, 3\) and \(4,\)", kfax.gaussian_nll, F, jnp.zeros(4), F),
        bad(r"`targets` of `gaussian_nll`.*got \(4,\)", kfax.gaussian_nll, F, F, jnp.zeros(4)),
        bad("one number for each example.*use `mask`", kfax.squared_error, F, F, weights=jnp.ones((4, 3))),
        bad("must be boolean", kfax.squared_error, F, F, mask=jnp.ones(4)),
        bad(r"or \(4,\), got bool of shape \(3,\)", kfax.squared_error, F, F, mask=jnp.ones(3, bool)),
    ],
)
def test_bad_arguments(match, call):
    with pytest.raises(ValueError, match=match):
        call()


@grid(loss=ALL_LOSSES)
def test_losses_are_pytrees(loss):
    made, *_ = make(loss, "sequence", mask=position_mask("sequence"))
    doubled = jax.jit(lambda loss: (2 * loss).value())(made)
    assert_close(doubled, 2 * made.value())
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(made))


@grid(method=["ggn_factor", "ggn_factor_transpose", "ggn_product"])
def test_a_learned_variance_has_no_ggn(method):
    made, *_ = make("gaussian_nll", "vector")
    with pytest.raises(ValueError, match=r"negative eigenvalues.*CurvaturePropagation\(source=kfax.ExactFisher\(\)\)"):
        getattr(made, method)(made.outputs)

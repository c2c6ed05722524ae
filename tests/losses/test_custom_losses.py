"""Losses by automatic differentiation, terms without curvature, and the check of losses of one's own."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import ALL_LOSSES, grid
from helpers import assert_close

import kfax
from kfax._capture import evaluate, linearize, Problem


KEY = jax.random.key(0)


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def exponential(f, y):
    """Waiting times y with the rates f > 0: neither defined nor differentiable at zero."""
    return jnp.sum(f * y - jnp.log(f))


# -- function_loss --


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


F = jnp.ones((4, 2, 3))


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


# -- penalties --


def objective(result):
    return evaluate(lambda model, batch: result, None, None)


def test_penalties_are_added_to_the_losses():
    loss = kfax.squared_error(F[0], jnp.zeros((2, 3)))
    penalty = 2 * kfax.Penalty(3.0) * 0.5
    for result in ([loss, penalty], {"a": penalty, "b": loss}, ([[loss], penalty], "aux")):
        evaluation = objective(result)
        assert evaluation.losses == (loss,) or len(evaluation.losses) == 1
        assert_close(evaluation.penalty, jnp.array(3.0))
        assert_close(evaluation.value(), loss.value() + 3)
    assert_close(objective([kfax.Penalty(1.0), loss, kfax.Penalty(2.0)]).penalty, jnp.array(3.0))
    assert objective(loss).penalty == 0
    assert objective(([loss, penalty], "aux")).aux == "aux"


def test_the_gradient_is_that_of_losses_and_penalties():
    """Also through what the function of a loss closes over."""
    model, x, y = eqx.nn.Linear(3, 2, key=KEY), random(1, 5, 3), random(2, 5, 2)

    def cosh(f, y):
        return jnp.sum(jnp.log(jnp.cosh(f - y)))

    def loss_fn(model, batch):
        scale = jnp.sum(model.bias**2)
        loss = kfax.function_loss(lambda f, y: scale * cosh(f, y), jax.vmap(model)(x), y)
        return [loss, 0.5 * kfax.Penalty(jnp.sum(jnp.abs(model.weight)))]

    def plain(model):
        loss = jnp.sum(model.bias**2) * jnp.mean(jax.vmap(cosh)(jax.vmap(model)(x), y))
        return loss + 0.5 * jnp.sum(jnp.abs(model.weight))

    linearization = linearize(Problem(loss_fn, model, (x, y)))
    assert_close(linearization.evaluation.value(), plain(model))
    assert_close(linearization.gradient(), eqx.filter_grad(plain)(model))


def test_penalties_keep_their_digits():
    half = jnp.ones((), jnp.bfloat16)
    assert kfax.Penalty(half).value().dtype == jnp.float32
    assert kfax.Penalty(jnp.ones((), jnp.float64)).value().dtype == jnp.float64
    single = kfax.squared_error(jnp.ones((2, 3), jnp.float32), jnp.ones((2, 3)))
    assert objective(single).value().dtype == jnp.float32
    assert objective([single, kfax.Penalty(half)]).value().dtype == jnp.float32


def test_bad_penalties():
    with pytest.raises(ValueError, match="a single real number, got float64 of shape"):
        kfax.Penalty(F)
    with pytest.raises(ValueError, match="penalties only"):
        objective([kfax.Penalty(1.0)])
    with pytest.raises(ValueError, match="penalties only"):
        objective(kfax.Penalty(1.0))


# -- check_loss --


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
    made = kfax.squared_error(F.astype(jnp.bfloat16), F)
    with pytest.raises(ValueError, match="float32 or float64 outputs, to tell errors from rounding, got bfloat16"):
        kfax.check_loss(made, key=KEY)


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


def test_learned_variances_with_the_quadratic_model():
    model = kfax.tag(eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=KEY))
    x = random(1, 12, 2)

    def loss_fn(model, batch):
        means, log_variances = jnp.split(jax.vmap(model)(batch), 2, axis=1)
        return kfax.gaussian_nll(means, log_variances, batch[:, :1])

    auto = kfax.QuadraticModel(kfax.ExactFisher())
    settings: dict[str, Any] = {
        "learning_rate": auto,
        "momentum": auto,
        "damping": kfax.LevenbergMarquardt(initial=1.0),
        "preconditioner": kfax.Preconditioner(
            kfax.BlockDiagonalCurvature(kfax.CurvaturePropagation(source=kfax.ExactFisher()))
        ),
    }
    optimizer = kfax.Optimizer(loss_fn, **settings)
    state, losses = optimizer.init(model, x), []
    step = eqx.filter_jit(optimizer.step)
    for i in range(5):
        model, state, info = step(model, state, x, key=jax.random.key(i))
        losses.append(float(info.loss))
    assert losses[-1] < losses[0]
    settings["momentum"] = kfax.QuadraticModel()
    with pytest.raises(ValueError, match="by one `kfax.QuadraticModel`"):
        kfax.Optimizer(loss_fn, **settings)
    with pytest.raises(ValueError, match="must be `kfax.ExactGGN"):
        kfax.QuadraticModel(kfax.SampledFisher())


def test_the_number_of_what_a_loss_fn_returns():
    outputs = jax.random.normal(jax.random.key(0), (5, 3))
    loss, penalty = kfax.squared_error(outputs, jnp.zeros((5, 3))), kfax.Penalty(0.25)
    number = jnp.mean(jnp.sum(outputs**2, axis=1))
    for returned, expected in (
        (loss, number),
        (penalty, 0.25),
        ([loss, 2 * penalty], number + 0.5),
        ({"a": loss, "b": [3 * loss]}, 4 * number),
        ((loss, {"accuracy": 1.0}), number),
        (([loss, penalty], "state", "aux"), number + 0.25),
    ):
        assert_close(kfax.value(returned), jnp.asarray(expected))
    gradient = jax.grad(lambda f: kfax.value([kfax.squared_error(f, 0 * f), penalty]))(outputs)
    assert_close(gradient, 2 * outputs / 5)


@pytest.mark.parametrize("wrong", [1.0, (), [], jnp.ones(3), "loss"])
def test_what_is_no_loss_has_no_number(wrong):
    loss = kfax.squared_error(jnp.ones((5, 3)), jnp.zeros((5, 3)))
    for returned in (wrong, (wrong, loss), (loss, loss)):
        with pytest.raises(ValueError, match=r"`kfax\.value` takes what a `loss_fn` returns"):
            kfax.value(returned)

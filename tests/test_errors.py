"""What a user sees who gets it wrong: each message names the culprit and says what to do."""

import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import make_case
from helpers import assert_close, mlp

import kfax


def optimizer(loss_fn, **options):
    settings: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.9, "damping": 1.0}
    return kfax.Optimizer(loss_fn, **(settings | options))


class Scaled(eqx.Module):
    """A user's module with a parameter of its own."""

    scale: jax.Array
    linear: eqx.nn.Linear

    def __call__(self, x):
        return self.linear(self.scale * x)


@pytest.fixture
def scaled(key):
    return Scaled(jnp.ones(8), eqx.nn.Linear(8, 3, key=key))


@pytest.fixture
def case():
    return make_case("mlp", "softmax")


def test_1_a_parameter_without_a_block(scaled, case):
    advice = r"(?s)`\.scale`.*register a rule.*choose a block explicitly.*frozen=lambda model: model\.scale"
    with pytest.raises(ValueError, match=advice):
        kfax.tag(scaled)
    by_hand = eqx.tree_at(lambda m: m.linear, scaled, replace_fn=kfax.TaggedLinear)
    for raises in (
        lambda: optimizer(case.loss_fn).init(by_hand, case.batch),
        lambda: kfax.BlockDiagonalCurvature().init(by_hand),
        lambda: kfax.check(case.loss_fn, by_hand, case.batch),
    ):
        with pytest.raises(ValueError, match=advice):
            raises()
    with pytest.raises(ValueError, match=r"^No layer is tagged: was the model given to `kfax\.tag`"):
        optimizer(case.loss_fn).init(kfax.untag(case.model), case.batch)
    # Each of the ways out.
    tagged = kfax.tag(scaled, frozen=lambda m: m.scale)
    state = optimizer(case.loss_fn, frozen=lambda m: m.scale).init(tagged, case.batch)
    assert list(state.curvature.inverses) == [".linear"]


def test_2_examples_on_another_axis_than_the_mapped_one():
    model = kfax.tag(mlp(jax.random.key(0), (8, 5, 3)))
    x, y = jnp.ones((6, 4, 8)), jnp.zeros((4, 6), int)

    def time_first(model, batch):
        outputs = jax.vmap(jax.vmap(model))(batch[0])  # (time, batch, classes)
        return kfax.softmax_cross_entropy(jnp.moveaxis(outputs, 1, 0), batch[1])

    advice = (
        r"`\.layers\[\d\]` has an outermost mapped axis of size 6, but the Loss has 4 examples.*axis_name=\"batch\""
    )
    with pytest.raises(ValueError, match=advice):
        optimizer(time_first).init(model, (x, y))

    def named(model, batch):
        outputs = jax.vmap(jax.vmap(model, axis_name="batch"))(batch[0])
        return kfax.softmax_cross_entropy(jnp.moveaxis(outputs, 1, 0), batch[1])

    estimator = kfax.BlockDiagonalCurvature(example_axis="batch")
    optimizer(named, preconditioner=kfax.Preconditioner(estimator)).init(model, (x, y))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda loss: loss.value(), "returned an array of dtype float64.*not only the loss's value"),
        (lambda loss: 1.0, "returned a float.*softmax_cross_entropy"),
        (lambda loss: None, "returned a NoneType"),
        (lambda loss: (loss, loss), r"returned a tuple of 2.*`\[loss_1, loss_2\]`"),
        (lambda loss: (loss, 1, 2), "losses or .losses, aux."),
        (lambda loss: [loss, 3.0], "Among the losses .* there is a float.*`kfax.Penalty\\(value\\)`"),
    ],
)
def test_3_loss_fn_returns_something_else(case, wrong, match):
    def loss_fn(model, batch):
        return wrong(case.loss_fn(model, batch))

    with pytest.raises(ValueError, match=match):
        optimizer(loss_fn).init(case.model, case.batch)


def test_3_loss_fn_and_its_optional_arguments(case):
    def with_key(model, batch, key):
        return case.loss_fn(model, batch)

    with pytest.raises(ValueError, match=r"takes a `key`.*key=jax\.random\.key"):
        optimizer(with_key).init(case.model, case.batch)
    with pytest.raises(ValueError, match="has no parameter of this name"):
        optimizer(case.loss_fn).init(case.model, case.batch, model_state=0)

    def with_state(model, batch, model_state):
        return case.loss_fn(model, batch)

    with pytest.raises(ValueError, match="none was given: pass `model_state"):
        optimizer(with_state).init(case.model, case.batch)
    with pytest.raises(ValueError, match=r"must return \(losses, model_state\)"):
        optimizer(with_state).init(case.model, case.batch, model_state=jnp.zeros(2))


def test_3_losses_of_different_examples(case):
    def loss_fn(model, batch):
        outputs = jax.vmap(model)(batch[0])
        return [kfax.softmax_cross_entropy(outputs, batch[1]), kfax.squared_error(outputs[:3], outputs[:3])]

    with pytest.raises(ValueError, match=r"same examples.*\[3, 6\].*`weights` or `mask`"):
        optimizer(loss_fn).init(case.model, case.batch)


def test_4_integer_logits(case):
    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jnp.argmax(jax.vmap(model)(batch[0]), axis=1, keepdims=True), batch[1])

    with pytest.raises(ValueError, match="got int64.*`jnp.argmax`"):
        optimizer(loss_fn).init(case.model, case.batch)


@pytest.mark.parametrize("damping", [-1.0, 0.0, float("nan")])
def test_5_damping_that_is_not_positive(case, damping):
    with pytest.raises(ValueError, match="`damping` must be positive and finite, got"):
        optimizer(case.loss_fn, damping=damping)
    with pytest.raises(ValueError, match="`initial` must be positive and finite, got"):
        kfax.LevenbergMarquardt(damping)
    state = optimizer(case.loss_fn).init(case.model, case.batch)
    with pytest.raises(ValueError, match="`damping` must be positive and finite, got"):
        optimizer(case.loss_fn).step(case.model, state, case.batch, key=jax.random.key(0), damping=damping)


def test_what_a_second_newcomer_met(case):
    """Each had an error of Python's or JAX's, or none."""

    class Negative(kfax.FixedDamping):
        def value(self, stored, step):
            return -stored

    with pytest.raises(ValueError, match="`damping` must be positive and finite, got -1"):
        optimizer(case.loss_fn, damping=Negative(jnp.asarray(1.0))).init(case.model, case.batch)
    with pytest.raises(ValueError, match="`weights` of `softmax_cross_entropy` must be finite"):
        kfax.softmax_cross_entropy(jnp.ones((3, 2)), jnp.zeros(3, int), weights=jnp.array([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match=r"`kfax.Dense` takes a matrix, got a weight of shape \(4,\)"):
        kfax.Dense(jnp.ones(4)).shape()
    link = kfax.scale_by_curvature(case.loss_fn, damping=1.0)
    gradients = eqx.filter(case.model, eqx.is_inexact_array)
    with pytest.raises(ValueError, match="needs to see model and batch"):
        link.update(gradients, link.init(gradients), model=case.model)
    with pytest.raises(IndexError) as caught:
        kfax.function_loss(lambda f: jnp.mean(f, axis=1), jnp.ones((4, 3)))
    assert any("called for one place, here with outputs of shape (3,)" in note for note in caught.value.__notes__)
    loss = case.loss_fn(case.model, case.batch)
    assert_close((loss / 4).value(), loss.value() / 4)


def test_other_numbers_that_are_not_positive_get_no_advice_about_damping():
    for make in (lambda: kfax.NormConstraint(0.1, 0.0), lambda: kfax.DampingMultiple(0.0)):
        with pytest.raises(ValueError, match=r"must be positive and finite, got 0.0\.$"):
            make()


def test_a_loss_is_multiplied_by_one_number_that_is_not_negative(case):
    loss = case.loss_fn(case.model, case.batch)
    assert (jnp.asarray(2.0) * loss).value() == 2 * loss.value() == (loss * 2).value()
    assert_close(eqx.filter_jit(lambda c: (c * loss).value())(0.5), 0.5 * loss.value())
    with pytest.raises(ValueError, match="not negative, got -1: .* `kfax.Penalty`"):
        (lambda: -1 * loss)()
    with pytest.raises(ValueError, match=r"not by an array of shape \(3,\): .*`weights=`"):
        (lambda: jnp.ones(3) * loss)()


def test_a_power_of_the_dense_matrix_has_one_damping(case):
    power = kfax.Preconditioner(kfax.ExplicitExactCurvature(), exponent=-0.5)
    l2 = kfax.L2(0.1, lambda model: model.layers[0].weight)
    with pytest.raises(ValueError, match="give `l2` a number"):
        optimizer(case.loss_fn, preconditioner=power, l2=l2)


def test_6_targets_that_are_nan():
    case = make_case("mlp", "squared")
    batch = (case.x, case.y.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"loss is nan.*`batch\[1\]`: remove or mask them"):
        optimizer(case.loss_fn).init(case.model, batch)


def test_7_a_weight_used_behind_its_tag(case):
    def loss_fn(model, batch):
        outputs = jax.vmap(model)(batch[0])
        return kfax.softmax_cross_entropy(outputs + model.layers[0].weight.sum(), batch[1])

    with pytest.raises(ValueError, match=r"`\.layers\[0\]`.*Call the tagged layer wherever its weights are used"):
        optimizer(loss_fn).init(case.model, case.batch)


def test_8_a_registry_miss(key, scaled):
    linear = eqx.nn.Linear(2, 3, key=key)
    with pytest.raises(ValueError, match=r"no rule for `Linear`.*register\(Linear, rule\).*rules for: nothing"):
        kfax.Registry().apply(linear)
    with pytest.raises(ValueError, match=r"(?s)`\.weight`, `\.bias`.*register a rule"):
        kfax.tag(linear, registry=kfax.Registry())
    with pytest.raises(ValueError, match=r"must return a `kfax\.TaggedLayer`.*returned Linear"):
        kfax.tag(linear, registry=kfax.Registry({eqx.nn.Linear: lambda m: m}))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("learning_rate", lambda step: jnp.ones(2), r"schedule for `learning_rate`.*shape \(2,\)"),
        ("momentum", lambda step: jnp.ones((1, 1)), r"schedule for `momentum`.*shape \(1, 1\)"),
        ("damping", lambda step: jnp.ones(2), r"schedule for `damping`.*schedules of optax"),
        ("learning_rate", lambda step: "fast", "schedule for `learning_rate` must return a number"),
    ],
)
def test_9_a_schedule_that_is_no_number(case, name, value, match):
    with pytest.raises(ValueError, match=match):
        wrong = optimizer(case.loss_fn, **{name: value})
        wrong.step(case.model, wrong.init(case.model, case.batch), case.batch, key=jax.random.key(0))


def test_9_a_schedule_that_branches_on_the_step(case):
    optim = optimizer(case.loss_fn, learning_rate=lambda step: 0.1 if step < 10 else 0.01)
    state = optim.init(case.model, case.batch)
    with pytest.raises(ValueError, match=r"(?s)`learning_rate` asks for the value of the step.*`jnp\.where"):
        eqx.filter_jit(optim.step)(case.model, state, case.batch, key=jax.random.key(0))


def test_10_a_model_changed_after_init(case):
    k = optimizer(case.loss_fn)
    state = k.init(case.model, case.batch)
    wider = kfax.tag(mlp(jax.random.key(0), (8, 6, 4, 3)))
    with pytest.raises(ValueError, match=r"another model: at `\.layers\[0\]`.*optimizer\.init\(model, batch\)"):
        k.step(wider, state, case.batch, key=jax.random.key(0))
    shallower = kfax.tag(mlp(jax.random.key(0), (8, 3)))
    with pytest.raises(ValueError, match="another model: at"):
        k.step(shallower, state, case.batch, key=jax.random.key(0))
    block = kfax.KroneckerFactored(kfax.Reduce())
    other = eqx.tree_at(lambda m: m.layers[0], case.model, kfax.TaggedLinear(case.model.layers[0].layer, block=block))
    with pytest.raises(ValueError, match=r"other blocks.*optimizer\.init\(model, batch\)"):
        k.step(other, state, case.batch, key=jax.random.key(0))
    refrozen = optimizer(case.loss_fn, frozen=lambda m: m.layers[0].bias)
    with pytest.raises(ValueError, match=r"at `\.layers\[0\]`.*was `frozen` changed"):
        refrozen.step(case.model, state, case.batch, key=jax.random.key(0))


# -- and some more --


def test_a_random_source_without_a_key(case):
    for source in (kfax.SampledFisher(), kfax.CurvaturePropagation()):
        k = optimizer(case.loss_fn, preconditioner=kfax.Preconditioner(kfax.BlockDiagonalCurvature(source)))
        with pytest.raises(ValueError, match=r"pass `key=jax\.random\.key.*ExactGGN"):
            k.step(case.model, k.init(case.model, case.batch), case.batch)


def test_a_dense_layer_that_is_not_mapped(case):
    inputs, labels = case.batch
    with pytest.raises(ValueError, match=rf"shape \({inputs.shape[1]},\).*{inputs.shape}.*`jax\.vmap\(model\)"):
        case.model(inputs)
    scalar = kfax.tag(eqx.nn.Linear("scalar", 2, key=jax.random.key(0)))
    assert scalar(jnp.ones(())).shape == (2,)
    with pytest.raises(ValueError, match=r"shape \(\).*\(1,\)"):
        scalar(jnp.ones(1))
    stack = eqx.filter_vmap(lambda key: kfax.tag(eqx.nn.Linear(8, 3, key=key)))(jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"a stack of `equinox\.nn\.Linear`.*`equinox\.filter_vmap` too"):
        stack(inputs[0])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"learning_rate": -0.1}, r"`learning_rate` must not be negative or infinite, got -0\.1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must not be negative or infinite, got nan"),
        ({"momentum": 1.5}, r"`momentum` must be in \[0, 1\], got 1\.5"),
        ({"momentum": -0.5}, r"`momentum` must be in \[0, 1\]"),
        ({"learning_rate": kfax.QuadraticModel}, r"not a class: write `kfax\.QuadraticModel\(\.\.\.\)`"),
        ({"damping": kfax.LevenbergMarquardt}, r"not a class: write `kfax\.LevenbergMarquardt\(\.\.\.\)`"),
    ],
)
def test_coefficients_out_of_range(case, settings, match):
    with pytest.raises(ValueError, match=match):
        optimizer(case.loss_fn, **settings)
    with pytest.raises(ValueError, match="`learning_rate` must not be negative"):
        kfax.NormConstraint(-0.1, 1e-3)


@pytest.mark.parametrize(
    "where",
    [
        lambda model: jax.tree.map(lambda leaf: eqx.is_array(leaf) and leaf.ndim > 1, model),
        lambda model: [],
        lambda model: model.layers[0],
    ],
    ids=["booleans", "nothing", "frozen"],
)
def test_l2_of_nothing(case, where):
    optim = optimizer(case.loss_fn, l2=kfax.L2(0.1, where), frozen=lambda model: model.layers[0])
    with pytest.raises(ValueError, match=r"`where` of `kfax\.L2` must return nodes.*\(no mask of booleans\)"):
        optim.init(case.model, case.batch)


def test_parameters_of_loss_fn_that_are_not_known(case):
    with pytest.raises(ValueError, match=r"parameter `rng`, which kfax does not know.*`key` and `model_state`"):
        optimizer(lambda model, batch, rng: case.loss_fn(model, batch)).init(case.model, case.batch)
    fine = optimizer(lambda model, batch, *rest, scale=2.0, **more: scale * case.loss_fn(model, batch))
    fine.init(case.model, case.batch)


def test_an_empty_batch(case):
    with pytest.raises(ValueError, match="The batch is empty"):
        optimizer(case.loss_fn).init(case.model, jax.tree.map(lambda x: x[:0], case.batch))


def test_a_step_can_be_printed(case):
    optim = optimizer(case.loss_fn)
    step = eqx.filter_jit(optim.step)
    info = step(case.model, optim.init(case.model, case.batch), case.batch, key=jax.random.key(0))[2]
    assert str(info).startswith(f"step 0: loss {float(info.loss):.4g}, gradient_norm ")
    assert str(info).endswith("damping 1, reduction_ratio nan. The step was taken.")
    several = jax.tree.map(lambda x: jnp.stack([x, x]), info)
    assert str(several) == repr(several)


def test_a_loss_where_a_number_is_needed(case):
    loss = case.loss_fn(case.model, case.batch)
    with pytest.raises(TypeError, match=r"(?s)scalar-output.*a kfax Loss; the number is its `value\(\)`"):
        eqx.filter_grad(case.loss_fn)(case.model, case.batch)
    for add in (lambda: loss + 0.1, lambda: 0.1 + loss, lambda: loss + loss, lambda: sum([loss, loss])):
        with pytest.raises(TypeError, match=r"a list of losses.*`kfax\.Penalty\(value\)`.*`l2=`"):
            add()


def test_periods_and_decays_out_of_range(case):
    with pytest.raises(ValueError, match="`inverse_update_period` must be a whole number, at least 1"):
        kfax.Preconditioner(inverse_update_period=0)
    with pytest.raises(ValueError, match="`curvature_update_period` must be a whole number, at least 1"):
        kfax.Preconditioner(curvature_update_period=0)
    with pytest.raises(ValueError, match="`period`.*at least 1"):
        kfax.LevenbergMarquardt(1.0, period=0)
    for make in (lambda v: kfax.LevenbergMarquardt(1.0, decay=v), lambda v: kfax.BlockDiagonalCurvature(decay=v)):
        for value in (0.0, 1.5):
            with pytest.raises(ValueError, match=r"`decay` must be in \(0, 1\]"):
                make(value)
    for source in (kfax.SampledFisher, kfax.CurvaturePropagation):
        with pytest.raises(ValueError, match="`num_samples` must be a number, at least 1, got 0"):
            source(0)


def test_frozen_must_select_nodes_of_the_model(case):
    for where in (lambda m: m.layers[0].weight + 1, lambda m: []):
        with pytest.raises(ValueError, match=r"`frozen` must return nodes of the model"):
            kfax.coverage(case.model, frozen=where)
    with pytest.raises(ValueError, match=r"`where` of `kfax\.L2`"):
        k = optimizer(case.loss_fn, l2=kfax.L2(0.1, lambda m: m.layers[0].weight * 2))
        k.step(case.model, k.init(case.model, case.batch), case.batch, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no parameter to train"):
        kfax.tag(case.model, frozen=lambda m: m)


def test_an_axis_that_has_no_such_name(case):
    def unnamed(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    k = optimizer(unnamed, preconditioner=kfax.Preconditioner(kfax.BlockDiagonalCurvature(example_axis="batch")))
    with pytest.raises(ValueError, match=r"no axis is named 'batch'.*leave `example_axis` out"):
        k.init(case.model, case.batch)


def test_a_mismatch_is_found_under_jit_too():
    """Inside `jit` `init` cannot look at values, but a wrong axis still never gives a wrong statistic."""
    model = kfax.tag(mlp(jax.random.key(0), (8, 5, 3)))
    batch = (jnp.ones((6, 4, 8)), jnp.zeros((4, 6), int))

    def time_first(model, batch):
        outputs = jax.vmap(jax.vmap(model))(batch[0])
        return kfax.softmax_cross_entropy(jnp.moveaxis(outputs, 1, 0), batch[1])

    k = optimizer(time_first)
    state = eqx.filter_jit(k.init)(model, batch)
    with pytest.raises(Exception, match="outermost mapped axis of size 6, but the Loss has 4"):
        jax.block_until_ready(eqx.filter_jit(k.step)(model, state, batch, key=jax.random.key(0)))


def _derivatives():
    """Ways in which a `loss_fn` takes derivatives of a model by its inputs."""

    def along(model, x):
        return jax.jvp(lambda z: model(z)[0], (x,), (jnp.ones_like(x),))[1]

    def gradient(model, x):
        return jnp.sum(jax.grad(lambda z: model(z)[0])(x) ** 2)

    def laplacian(model, x):
        return jnp.trace(jax.hessian(lambda z: model(z)[0])(x))

    def jacobian(model, x):
        return jnp.sum(jax.jacfwd(model)(x) ** 2)

    return {f.__name__: f for f in (along, gradient, laplacian, jacobian)}


@pytest.mark.parametrize("rematerialized", [False, True])
@pytest.mark.parametrize("name", _derivatives())
def test_losses_with_derivatives_by_the_inputs(name, rematerialized, case):
    derivative = _derivatives()[name]
    if rematerialized:
        derivative = eqx.filter_checkpoint(derivative)

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(lambda x: derivative(model, x))(batch[0]), jnp.zeros(6))

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    culprit = "a tagged layer" if name in ("along", "jacobian") else r"the layer at `\.layers\[\d\]`"
    message = rf"`loss_fn` differentiates {culprit}\. (?s:.*)kfax\.untag(?s:.*)ImplicitExactCurvature"
    for run in (
        lambda: eqx.filter_jit(estimator.update)(estimator.init(case.model), loss_fn, case.model, case.batch),
        lambda: optimizer(loss_fn).init(case.model, case.batch),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_derivatives_of_which_only_the_value_matters(case):
    """An adversarial example, made as the message says."""

    def attack(model, x):
        model = kfax.untag(model)
        return x + 0.1 * jax.lax.stop_gradient(jnp.sign(jax.grad(lambda z: model(z)[0])(x)))

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(lambda x: model(attack(model, x)))(batch[0]), batch[1])

    kfax.check(loss_fn, case.model, case.batch)
    moved = jax.vmap(lambda x: attack(case.model, x))(case.x)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    within = estimator.update(estimator.init(case.model), loss_fn, case.model, case.batch)
    before = estimator.update(estimator.init(case.model), case.loss_fn, case.model, (moved, case.y))
    for found, expected in zip(jax.tree.leaves(within), jax.tree.leaves(before), strict=True):
        assert jnp.allclose(found, expected, rtol=1e-12)


MISTAKES = """
import equinox as eqx, jax, jax.numpy as jnp, kfax
linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
model, batch = kfax.tag(linear), (jnp.ones((4, 2)), jnp.ones((4, 3)))
settings = {"learning_rate": 0.1, "momentum": 0.9, "damping": 1.0}
def optimizer(loss_fn=lambda model, batch: None, **options):
    return kfax.Optimizer(loss_fn, **(settings | options))
optim = optimizer(lambda model, batch: kfax.squared_error(jax.vmap(model)(batch[0]), batch[1]))
state = optim.init(model, batch)
mistakes = {
    "`learning_rate` must be a number, or a schedule": lambda: optimizer(learning_rate="0.1"),
    "`block` of `kfax.tag` must be one block": lambda: kfax.tag(linear, block=kfax.Diagonal),
    "For other blocks in single layers see `kfax.set_block`": lambda: kfax.tag(linear, block={"": kfax.Diagonal()}),
    "`momentum` must be a number": lambda: optimizer(momentum=None),
    "`damping` must be a single number, got an array of shape (2,)": lambda: optimizer(damping=jnp.ones(2)),
    "`loss_fn` must be a function of model and batch, got float": lambda: optimizer(1.0),
    "takes the class of a module": lambda: kfax.default_registry.register(linear, kfax.TaggedLinear),
    "wraps an `equinox.nn.Linear`, got LayerNorm": lambda: kfax.TaggedLinear(eqx.nn.LayerNorm(3)),
    "`block` must be a block, such as `kfax.KroneckerFactored()`": lambda: kfax.TaggedLinear(linear, block="kfac"),
    "`sharing` must be `kfax.Expand()` or `kfax.Reduce()`": lambda: kfax.KroneckerFactored("reduce"),
    "`inversion` must be `kfax.Cholesky()` or `kfax.Eigh()`, got 'eigh'": lambda: kfax.Full(inversion="eigh"),
    "`inversion` must be `kfax.Cholesky()`": lambda: kfax.KroneckerFactored(inversion=None),
    "`source` must be a curvature source, or `kfax.Hessian()`": lambda: kfax.ImplicitExactCurvature(None),
    "`source` must be a curvature source, such as `kfax.ExactGGN()`": lambda: kfax.BlockDiagonalCurvature("ggn"),
    "as an array of real floating-point numbers, got float": lambda: kfax.squared_error(1.0, 2.0),
    "`rule` must be a function": lambda: kfax.default_registry.register(eqx.nn.Linear, kfax.Full()),
    "`check_loss` takes a `kfax.Loss`, got Penalty": lambda: kfax.check_loss(kfax.Penalty(1.0), key=jax.random.key(0)),
    "takes a module and one boolean, got TaggedLinear": lambda: kfax.masked(True, model),
    "`frozen` must be a function of the model, as in": lambda: kfax.tag(linear, frozen=".weight"),
    "must be a single JAX key, such as `jax.random.key(0)`, got 0": lambda: optim.step(model, state, batch, key=0),
    "must be a single JAX key": lambda: optim.step(model, state, batch, key=jax.random.split(jax.random.key(0), 3)),
    "got TaggedLinear. Were the arguments of `step(": lambda: optim.step(state, model, batch, key=jax.random.key(0)),
}
for message, make in mistakes.items():
    try:
        make()
    except ValueError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"no error: {message}")
print(len(mistakes), "mistakes")
"""


def test_objects_of_the_wrong_type():
    """In a process of its own, without the run-time type checker, as a user has it."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", MISTAKES], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "22 mistakes\n"

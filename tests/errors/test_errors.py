"""What a user sees who gets it wrong: each message names the culprit and says what to do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import make_case
from error_cases import optimizer
from helpers import mlp

import kfax


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

    with pytest.raises(ValueError, match=r"losses are of 6 and 3 examples.*`weights` or `mask`"):
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

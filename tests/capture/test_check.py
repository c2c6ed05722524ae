"""The self-check: clean models pass, and a weight used behind its tag's back is named."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, LOSSES, make_case, MODELS

import kfax


@grid(thin=2, model=MODELS, loss=LOSSES)
def test_clean_models_pass(model, loss):
    case = make_case(model, loss)
    kfax.check(case.loss_fn, case.model, case.batch)
    kfax.check(case.loss_fn, case.model, case.batch, example_axis="batch")


def test_a_gradient_that_only_the_loss_spoils_is_found():
    case = make_case("mlp", "squared")
    zero = jax.tree.map(lambda x: 0 * x if eqx.is_inexact_array(x) else x, case.model)

    def loss_fn(model, batch):
        return kfax.function_loss(lambda f: jnp.sqrt(jnp.sum(f**2)), jax.vmap(model)(batch[0]))

    with pytest.raises(ValueError, match=r"The loss is finite, but its gradient .* is not"):
        kfax.check(loss_fn, zero, case.batch)


def test_modules_that_are_undefined_for_absolute_values_pass():
    class Root(eqx.Module):
        scale: jax.Array

        def __call__(self, x):
            return self.scale * jnp.sqrt(1 - x)

    class Several(eqx.Module):
        root: Any

        def __call__(self, xs):  # the two gradients are sums in different orders, and differ by rounding
            return jnp.sum(jax.vmap(self.root)(xs), axis=0) + self.root(xs[0] / 3)

    root = Root(jnp.linspace(0.5, 1.5, 8, dtype=jnp.float32))
    x = jax.random.uniform(jax.random.key(0), (64, 5, 8), jnp.float32, minval=-4, maxval=-1)

    def loss_fn(model, batch):
        outputs = jax.vmap(model)(batch)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    kfax.check(loss_fn, Several(kfax.TaggedModule(root, block=kfax.Diagonal())), x)


@pytest.mark.parametrize("estimator", [kfax.ExplicitExactCurvature(), kfax.ImplicitExactCurvature()])
def test_exact_estimators_take_losses_that_differentiate_the_model(estimator):
    """They observe no layer, so that `init` does not either."""
    case = make_case("mlp", "squared")

    def loss_fn(model, batch):
        slopes = jax.vmap(jax.jacrev(model))(batch[0])
        return kfax.squared_error(slopes[:, :, 0], jnp.zeros_like(slopes[:, :, 0]))

    def make(preconditioner=None):
        return kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.0, damping=1.0, preconditioner=preconditioner)

    optimizer = make(kfax.Preconditioner(estimator))
    state = optimizer.init(case.model, case.batch)
    _, _, info = eqx.filter_jit(optimizer.step)(case.model, state, case.batch)
    assert info.result == kfax.StepResult.successful
    with pytest.raises(ValueError, match="`loss_fn` differentiates the layer"):
        make().init(case.model, case.batch)
    bad = (case.x * jnp.nan, case.y)
    with pytest.raises(ValueError, match=r"The loss is nan .*`batch\[0\]`"):
        optimizer.init(case.model, bad)


class Pair(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear


@pytest.fixture
def pair(key):
    k1, k2 = jax.random.split(key)
    return kfax.tag(Pair(eqx.nn.Linear(8, 5, key=k1), eqx.nn.Linear(5, 5, key=k2)))


def decode_with_transpose(model, x):
    return model.first.weight.T @ jnp.tanh(model.second(jnp.tanh(model.first(x))))


def only_raw(model, x):
    return model.second(jnp.tanh(model.first.weight @ x + model.first.bias))


def raw_bias(model, x):
    return model.second(jnp.tanh(model.first(x))) + model.second.bias**2


def stopped_copy(model, x):
    stopped = eqx.tree_at(lambda m: m.layer.weight, model.first, jax.lax.stop_gradient(model.first.weight))
    return model.second(jnp.tanh(stopped(x)))


def rescaled_copy(model, x):
    doubled = eqx.tree_at(lambda m: m.layer.weight, model.first, 2 * model.first.weight)
    return model.second(jnp.tanh(doubled(x)))


def penalized(model, x):
    return model.second(jnp.tanh(model.first(x))) + jnp.sum(model.second.weight**2)


FAULTS = {
    "transpose": (decode_with_transpose, ".first"),
    "only-raw": (only_raw, ".first"),
    "raw-bias": (raw_bias, ".second"),
    "stopped": (stopped_copy, ".first"),
    "rescaled": (rescaled_copy, ".first"),
    "penalized": (penalized, ".second"),
}


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(pair, fault, dtype):
    forward, path = FAULTS[fault]
    model = jax.tree.map(lambda x: x.astype(dtype), pair)
    x = jax.random.normal(jax.random.key(1), (6, 8)).astype(dtype)

    def loss_fn(model, x):
        outputs = jax.vmap(lambda z: forward(model, z))(x)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    with pytest.raises(ValueError, match=rf"layer at `{path}`.*is off by \d+.*behind its tag's back.*Call the tagged"):
        kfax.check(loss_fn, model, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_examples", [1, 300])
def test_rounding_is_not_a_fault(pair, dtype, num_examples):
    x = jax.random.normal(jax.random.key(1), (num_examples, 8))

    def loss_fn(model, x):
        cast = jax.tree.map(lambda p: p.astype(dtype), model)
        outputs = jax.vmap(lambda z: cast.second(jnp.tanh(cast.first(z))))(x.astype(dtype))
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    kfax.check(loss_fn, pair, x)
    kfax.check(loss_fn, jax.tree.map(lambda p: p.astype(jnp.float32), pair), x.astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_gradient_that_vanishes_is_not_a_fault(dtype):
    """Softmax attention does not depend on the key's bias, of which only rounding noise is left."""
    case = make_case("attention", "squared")
    cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x  # noqa: E731
    model, batch = jax.tree.map(cast, (case.model, case.batch))
    kfax.check(case.loss_fn, model, batch, frozen=lambda m: m.attention.key_proj.weight)


def test_a_layer_that_is_not_used_is_no_fault(pair):
    def loss_fn(model, x):
        return kfax.squared_error(jax.vmap(model.first)(x), jnp.zeros((len(x), 5)))

    kfax.check(loss_fn, pair, jnp.ones((4, 8)))


def test_a_frozen_layer_may_be_used_raw(pair):
    def loss_fn(model, x):
        outputs = jax.vmap(lambda z: decode_with_transpose(model, z))(x)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    kfax.check(loss_fn, pair, jnp.ones((4, 8)), frozen=lambda m: m.first)


def test_all_faults_are_listed(pair):
    def loss_fn(model, x):
        outputs = jax.vmap(lambda z: only_raw(model, z) + model.second.weight @ jnp.ones(5))(x)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    with pytest.raises(ValueError, match=r"`\.first`.*and also: `\.second`"):
        kfax.check(loss_fn, pair, jnp.ones((4, 8)))


@pytest.mark.parametrize(
    ("where", "match"),
    [("batch", r"loss is nan.*in `batch\[1\]`"), ("model", r"`model\.layers\[0\]\.layer\.bias`")],
)
def test_a_loss_that_is_not_finite_says_where_from(where, match):
    case = make_case("mlp", "squared")
    model, (x, y) = case.model, case.batch
    if where == "batch":
        y = y.at[2, 1].set(jnp.nan)
    else:
        model = eqx.tree_at(lambda m: m.layers[0].layer.bias, model, jnp.full(5, jnp.nan))
    with pytest.raises(ValueError, match=match):
        kfax.check(case.loss_fn, model, (x, y))


def test_labels_out_of_range_are_found():
    case = dataclasses.replace(make_case("mlp", "softmax"), y=jnp.full(6, 3))
    with pytest.raises(ValueError, match="labels outside the range"):
        kfax.check(case.loss_fn, case.model, case.batch)

"""Weights that are none, and weights whose sum is too large for their dtype."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALL_LOSSES, grid, make_case
from helpers import assert_close

import kfax


BAD = {"nan": jnp.nan, "infinite": jnp.inf, "negative": -1.0}


def make(loss, weights, dtype=jnp.float64, **options):
    case = ALL_LOSSES[loss]
    outputs = jax.random.normal(jax.random.key(1), (5, 4), dtype)
    return case.make(outputs, case.targets(jax.random.key(2), outputs.shape), weights=weights, **options)


@grid(thin=3, loss=ALL_LOSSES, bad=BAD)
def test_what_is_no_weight_is_an_error_where_it_is_known(loss, bad):
    weights = np.ones(5)
    weights[2] = BAD[bad]
    for given in (weights, jnp.asarray(weights)):
        with pytest.raises(ValueError, match="`weights` of `.*` must be finite and not negative"):
            make(loss, given)
        # Known numbers are known within `jit` as well.
        with pytest.raises(ValueError, match="`weights` of `.*` must be finite and not negative"):
            jax.jit(lambda _, given=given: make(loss, given).value())(0)


@grid(thin=3, loss=ALL_LOSSES, bad=BAD, mask=[None, jnp.array([True, True, False, True, True])])
def test_what_is_no_weight_makes_the_loss_nan_within_jit(loss, bad, mask):
    @jax.jit
    def numbers(weights):
        made = make(loss, weights, mask=mask)
        return made.value(), made.total_weight(), made.example_weights()

    good, wrong = jnp.array([1.0, 2.0, 1.0, 0.0, 1.0]), jnp.array([1.0, 2.0, BAD[bad], 0.0, 1.0])
    assert all(jnp.all(jnp.isfinite(x)) for x in numbers(good))
    value, total, relative = numbers(wrong)
    counts = jnp.ones(5, bool) if mask is None else mask
    assert jnp.isnan(value) and jnp.isnan(total) and jnp.all(jnp.isnan(relative) | ~counts)


@pytest.mark.parametrize("bad", BAD)
def test_a_step_with_what_is_no_weight_is_not_taken(bad):
    case = make_case("mlp", "softmax")

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1], weights=batch[2])

    optimizer = kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.9, damping=0.1, micro_batches=2)
    good = (*case.batch, jnp.ones(6))
    wrong = (*case.batch, jnp.ones(6).at[1].set(BAD[bad]))
    reason = "negative weights" if bad == "negative" else r"`batch\[2\]`"
    with pytest.raises(ValueError, match=f"loss is nan.*{reason}"):
        optimizer.init(case.model, wrong)
    state = optimizer.init(case.model, good)
    step = eqx.filter_jit(optimizer.step)
    model, after, info = step(case.model, state, wrong, key=jax.random.key(0))
    assert info.result == kfax.StepResult.non_finite_batch and jnp.isnan(info.loss)
    assert bool(eqx.tree_equal(model, case.model)) and after.curvature.average.weight == 0


@pytest.mark.parametrize("size", [1e38, 3e38, 1e-36])
def test_only_the_ratios_of_weights_matter(size):
    """Their sum is infinite in float32."""
    case = make_case("mlp", "softmax")
    batch = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, case.batch)
    model = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, case.model)
    ratios = jnp.array([1.0, 0.5, 0.25, 0.0, 1.0, 0.5], jnp.float32)

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1], weights=batch[2])

    optimizer = kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.9, damping=0.1, l2=1e-3)
    step, ends = eqx.filter_jit(optimizer.step), []
    for scale in (1.0, size):
        last, state = model, optimizer.init(model, (*batch, ratios))
        for i in range(4):
            weighted = (*batch, jnp.float32(scale) * ratios)
            last, state, info = step(last, state, weighted, key=jax.random.key(i))
            assert info.result == kfax.StepResult.successful
        ends.append(kfax.parameters_of(last))
    assert_close(ends[1], ends[0])


@pytest.mark.parametrize("factor", [-1.0, jnp.nan, jnp.inf])
def test_what_a_loss_is_not_multiplied_by(factor):
    loss = make("squared", None)
    for multiply in (lambda c: c * loss, jax.jit(lambda _: (factor * loss).value())):
        with pytest.raises(ValueError, match="multiplied by numbers that are finite and not negative"):
            multiply(factor)
    assert jnp.isnan(jax.jit(lambda c: (c * loss).value())(factor))

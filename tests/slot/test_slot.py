"""The slot under every transformation, against explicit computation of one example and one use at a time."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close
from slot_cases import (
    collect,
    COTANGENT,
    D,
    expected,
    gradients,
    KINDS,
    make_slot,
    MOMENTS,
    moments,
    N,
    NAME,
    NAMED,
    QUERY,
    recurrent_unrolled,
    SCENARIOS,
    T,
    VECTORS,
    WEIGHT,
)

from kfax._example_axis import ExampleAxis
from kfax._slot import observe, Slot


@pytest.mark.parametrize(("name", "kind"), NAMED)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_equals_explicit_rows(scenario, name, kind):
    if scenario.needs_name and name is None:
        with pytest.raises(Exception, match=r"`\.layer` .*Name the axis of the examples"):
            jax.block_until_ready(collect(scenario.batched, kind, name, scenario.x))
        return
    if scenario.name == "constant-input-and-scan":
        # One row of the first call of f feeds all T steps, so the unrolled model must call it once too.
        explicit = lambda f, x: (lambda z: recurrent_unrolled(f, [z] * T) * x)(f(QUERY))  # noqa: E731
    else:
        explicit = scenario.explicit
    assert_close(collect(scenario.batched, kind, name, scenario.x), expected(explicit, kind, scenario.x))


@pytest.mark.parametrize("kind", KINDS)
def test_example_weights_follow_the_example_axis(kind):
    weights = jnp.arange(1.0, N + 1)
    for name, scenario in [(None, SCENARIOS[1]), (NAME, SCENARIOS[1]), (NAME, SCENARIOS[9]), (None, SCENARIOS[3])]:
        actual = collect(scenario.batched, kind, name, scenario.x, weights=weights)
        assert_close(actual, expected(scenario.explicit, kind, scenario.x, weights=weights))


def lax_map(batch_size):
    return lambda layer, x, name: jax.lax.map(lambda z: jnp.tanh(layer(z)), x, batch_size=batch_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_lax_map_over_examples_is_refused(batch_size, kind):
    with pytest.raises(Exception, match=r"`\.layer` .* but the Loss has 8 examples.*Name the axis"):
        jax.block_until_ready(collect(lax_map(batch_size), kind, None, VECTORS))
    with pytest.raises(ValueError, match=r"no axis is named 'batch'.*jax\.vmap\(model, axis_name='batch'\)"):
        collect(lax_map(batch_size), kind, NAME, VECTORS)


def chunked(layer, x, name):
    chunks = x.reshape(2, N // 2, D)
    run = jax.vmap(lambda z: jnp.tanh(layer(z)), axis_name=name)
    return jax.lax.scan(lambda _, chunk: (None, run(chunk)), None, chunks)[1].reshape(N, D)


def test_named_chunks_give_sums_but_not_what_needs_all_examples_together():
    plain = SCENARIOS[0].explicit
    assert_close(collect(chunked, moments, NAME, VECTORS), expected(plain, moments, VECTORS))
    for kind, weights in [(gradients, None), (moments, jnp.ones(N))]:
        with pytest.raises(Exception, match="sees 4 examples at a time.*but the Loss has 8"):
            jax.block_until_ready(collect(chunked, kind, NAME, VECTORS, weights=weights))


def test_bfloat16_rows_give_statistics_in_the_dtype_of_the_slot():
    low = VECTORS.astype(jnp.bfloat16)

    def statistic(use):
        x, dy = use.x, use.dy
        rows = x.reshape(-1, D)
        return jnp.matmul(rows.T, rows, preferred_element_type=jnp.float32), jnp.sum(dy, dtype=jnp.float32)

    zeros = (jnp.zeros((D, D), jnp.float32), jnp.zeros((), jnp.float32))

    def run(value):
        slot = Slot(value, None, statistic, ExampleAxis(None, (range(N),), True, ".layer"))
        return jax.vmap(lambda z: observe(WEIGHT.astype(jnp.bfloat16) @ z, z, slot))(low)

    a, _ = jax.vjp(run, zeros)[1](COTANGENT.astype(jnp.bfloat16))[0]
    exact = low.astype(jnp.float32)
    assert_close(a, exact.T @ exact)


@pytest.mark.parametrize("observed", [False, True])
def test_integer_inputs(observed):
    table, ids = jax.random.normal(jax.random.key(1), (11, D)), jnp.array([3, 1, 3, 7, 0, 1, 3, 10])

    def counts(use):
        return jnp.zeros(11).at[use.x.reshape(-1)].add(1.0)

    def run(table, value):
        slot = Slot(value, None, counts, ExampleAxis(None, (range(N),), True, ".layer")) if observed else None
        return jax.vmap(lambda i: observe(table[i], i, slot))(ids)

    outputs, pullback = jax.vjp(run, table, jnp.zeros(11))
    gradient, found = pullback(COTANGENT)
    assert_close(outputs, table[ids])
    assert_close(gradient, jnp.zeros((11, D)).at[ids].add(COTANGENT))
    assert_close(found, jnp.bincount(ids, length=11).astype(float) if observed else jnp.zeros(11))


def test_without_a_slot_observe_is_the_identity():
    y = jnp.arange(3.0)
    assert observe(y, y, None) is y


def test_pullback_can_be_taken_into_a_branch():
    def run(weight, value):
        slot = make_slot(moments, None, value)
        return jax.vmap(lambda z: observe(weight @ z, z, slot))(VECTORS)

    @jax.jit
    def maybe(predicate):
        _, pullback = jax.vjp(run, WEIGHT, MOMENTS)
        return pullback(COTANGENT)[0], jax.lax.cond(predicate, lambda: pullback(COTANGENT)[1], lambda: MOMENTS)

    gradient, taken = maybe(True)
    assert_close(gradient, COTANGENT.T @ VECTORS)
    assert_close(taken, expected(lambda f, x: f(x), moments, VECTORS))
    assert_close(maybe(False)[1], MOMENTS)

"""What there is to compile: programs of `init`, kernels of a step."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.monitoring
import jax.numpy as jnp

import kfax


def network(depth):
    """Layers of different widths, none of which can share a kernel."""
    sizes = [8, *range(20, 20 + 2 * depth, 2)]
    keys = jax.random.split(jax.random.key(0), depth)
    layers = [eqx.nn.Linear(i, o, key=k) for i, o, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]
    return kfax.tag(eqx.nn.Sequential([each for layer in layers for each in (layer, eqx.nn.Lambda(jnp.tanh))]))


def loss_fn(model, x):
    outputs = jax.vmap(model)(x)
    return kfax.squared_error(outputs, jnp.zeros_like(outputs))


def adaptive():
    auto = kfax.QuadraticModel()
    return kfax.Optimizer(loss_fn, learning_rate=auto, momentum=auto, damping=kfax.LevenbergMarquardt(1.0))


def test_init_compiles_the_check_and_next_to_nothing():
    model, x, optimizer, programs = network(5), jnp.ones((7, 8)), adaptive(), []

    def listen(event: str, duration_secs: float, **details: Any):
        del duration_secs
        if event.endswith("backend_compile_duration"):
            programs.append(details)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        optimizer.init(model, x)
    finally:
        jax.monitoring.clear_event_listeners()
    assert 1 <= len(programs) <= 4, programs


def test_kernels_of_a_step_grow_with_the_number_of_layers_and_no_faster():
    def kernels(depth):
        model, x, optimizer = network(depth), jnp.ones((7, 8)), adaptive()
        state = eqx.filter_jit(optimizer.init)(model, x)
        arrays, rest = eqx.partition((model, state, x, jax.random.key(0)), eqx.is_array)

        def step(arrays):
            model, state, x, key = eqx.combine(arrays, rest)
            return eqx.filter(optimizer.step(model, state, x, key=key), eqx.is_array)

        text = jax.jit(step).lower(arrays).compile().as_text()
        assert text is not None
        return len(re.findall(r" fusion\(", text)), len(text)

    (few, short), (more, long), (most, longest) = kernels(2), kernels(4), kernels(6)
    assert most - more <= 1.1 * (more - few) and longest - long <= 1.15 * (long - short)
    assert (most - few) / 4 <= 56  # for each layer

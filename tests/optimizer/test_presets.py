"""The presets: they train, and know no unit of the loss."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import make_case

import kfax


FACTOR = 1000.0
PRESETS = {
    "full_batch": kfax.full_batch,
    "stochastic": functools.partial(kfax.stochastic, learning_rate=0.03),
}


def losses(preset, factor, steps=12):
    """The losses of some steps on a loss that is multiplied by a factor, divided by it."""
    case = make_case("mlp", "softmax")
    optimizer = PRESETS[preset](lambda model, batch: factor * case.loss_fn(model, batch))
    model, state, values = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch), []
    step = eqx.filter_jit(optimizer.step)
    for i in range(steps):
        model, state, info = step(model, state, case.batch, key=jax.random.key(i))
        values.append(info.loss / factor)
    return jnp.stack(values)


@pytest.mark.parametrize("preset", PRESETS)
def test_multiplying_the_loss_changes_nothing(preset):
    plain, scaled = losses(preset, 1.0), losses(preset, FACTOR)
    # Rounding errors are amplified from step to step.
    assert jnp.allclose(scaled, plain, rtol=1e-7)
    assert plain[-1] < 0.9 * plain[0]


def test_the_full_batch_preset_takes_losses_without_a_ggn():
    case = make_case("mlp", "squared")

    def loss_fn(model, batch):
        means = jax.vmap(model)(batch[0])
        return kfax.gaussian_nll(means, 0.1 * means, batch[1])

    fisher = kfax.CurvaturePropagation(source=kfax.ExactFisher())
    optimizer = kfax.full_batch(
        loss_fn,
        estimator=kfax.BlockDiagonalCurvature(fisher, decay=0.5),
        quadratic_model=kfax.QuadraticModel(kfax.ExactFisher()),
    )
    model, state = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch)
    step, seen = eqx.filter_jit(optimizer.step), []
    for i in range(5):
        model, state, info = step(model, state, case.batch, key=jax.random.key(i))
        seen.append(float(info.loss))
    assert seen == sorted(seen, reverse=True) and seen[-1] < seen[0]

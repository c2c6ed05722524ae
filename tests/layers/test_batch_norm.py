"""Batch normalization and its state."""

import equinox as eqx
import jax
import jax.numpy as jnp
from cases import grid

import kfax


KEYS = jax.random.split(jax.random.key(0), 8)


@grid(thin=2, block=["UnitWise", "Diagonal"])
def test_batch_norm_in_a_sequence_is_trained_with_its_state(block):
    def build(key):
        keys = jax.random.split(key, 2)
        layers = [
            eqx.nn.Linear(4, 6, key=keys[0]),
            eqx.nn.BatchNorm(6, "batch", mode="batch"),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(6, 3, key=keys[1]),
        ]
        return eqx.nn.Sequential(layers)

    plain, state = eqx.nn.make_with_state(build)(KEYS[0])
    model = kfax.set_block(kfax.tag(plain), lambda m: m.layers[1], getattr(kfax, block)())

    def loss_fn(model, batch, model_state):
        x, y = batch
        call = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        outputs, model_state = call(x, model_state)
        return kfax.softmax_cross_entropy(outputs, y), model_state

    x, y = jax.random.normal(KEYS[1], (16, 4)), jnp.arange(16) % 3
    optimizer = kfax.Optimizer(
        loss_fn,
        learning_rate=0.3,
        momentum=0.0,
        damping=0.1,
        preconditioner=kfax.Preconditioner(kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")),
    )
    clone = lambda s: jax.tree.unflatten(jax.tree.structure(s), jax.tree.leaves(s))  # noqa: E731
    opt_state = optimizer.init(model, (x, y), model_state=clone(state))
    losses, step = [], eqx.filter_jit(optimizer.step)
    for _ in range(8):
        model, opt_state, info = step(model, opt_state, (x, y), model_state=state)
        state = info.model_state
        losses.append(float(info.loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(clone(state).get(model.layers[1].batch_counter)) == 8
    inference = eqx.nn.inference_mode(model)
    assert jnp.all(jnp.isfinite(inference(x[0], clone(state))[0]))


def test_the_initial_value_of_a_state_is_no_parameter():
    """Also where it was not removed, as `equinox.nn.make_with_state` does."""
    model = kfax.tag(eqx.nn.BatchNorm(3, "batch", mode="batch"))
    [row] = [row for row in kfax.coverage(model).rows if row.block != "frozen"]
    assert row.num_parameters == 6

"""One compiled update of the block-diagonal estimator, and squared errors of a model."""

import equinox as eqx
import jax

import kfax


def update(model, loss_fn, batch, frozen=None, example_axis=None):
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis=example_axis)
    run = eqx.filter_jit(lambda m, b: estimator.update(estimator.init(m, frozen=frozen), loss_fn, m, b, frozen=frozen))
    return estimator, run(model, batch)


def squared(model, batch):
    return kfax.squared_error(jax.vmap(model, axis_name="batch")(batch[0]), batch[1])

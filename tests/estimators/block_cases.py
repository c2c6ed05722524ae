"""The block-diagonal estimator on a case, and the blocks of the exact matrix."""

import equinox as eqx
from helpers import layer_groups, parameters
from reference import block_diagonal, ggn

import kfax


def estimate(case, source=None, key=None, example_axis="batch", frozen=None):
    estimator = kfax.BlockDiagonalCurvature(source or kfax.ExactGGN(), example_axis=example_axis)
    return estimator, update(estimator, case, key=key, frozen=frozen)


def update(estimator, case, state=None, model=None, batch=None, loss_fn=None, **options):
    """One compiled update, of a new state if none is given."""
    model, batch, loss_fn = model or case.model, batch or case.batch, loss_fn or case.loss_fn

    @eqx.filter_jit
    def run(state, model, batch):
        state = estimator.init(model, frozen=options.get("frozen")) if state is None else state
        return estimator.update(state, loss_fn, model, batch, **options)

    return run(state, model, batch)


def dense(case, **options):
    estimator, state = estimate(case, **options)
    return estimator.to_dense(state, parameters(case.model))


def exact_blocks(case, weights=None):
    matrix = ggn(case.outputs, parameters(case.model), case.one, case.y, weights)
    paths = [row.path for row in kfax.coverage(case.model).rows]
    return block_diagonal(matrix, layer_groups(case.model, paths))


def node(model, path):
    return eval("m" + path, {"m": model})


def members(model, path):
    stack = node(model, path).weight.shape[:-2]
    return range(stack[0]) if stack else [None]

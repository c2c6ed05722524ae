"""Statistics of a data set, taken in batch by batch: the same however it is split, and linear in the loss."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from cases import grid, LOSSES, make_case
from helpers import assert_close, parameters

import kfax


N = 20
BLOCKS = {
    "expand": kfax.KroneckerFactored(kfax.Expand()),
    "reduce": kfax.KroneckerFactored(kfax.Reduce()),
    "identity": kfax.ScaledIdentity(),
    "diagonal": kfax.Diagonal(),
    "unitwise": kfax.UnitWise(),
    "full": kfax.Full(),
}
ESTIMATORS = {
    **{name: kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0) for name in BLOCKS},
    "explicit": kfax.ExplicitExactCurvature(decay=1.0),
}
SOURCES = {
    "ggn": kfax.ExactGGN(),
    "fisher": kfax.ExactFisher(),
    "empirical": kfax.EmpiricalFisher(),
    "sampled": kfax.SampledFisher(2),
    "signs": kfax.CurvaturePropagation(2),
    "fisher-signs": kfax.CurvaturePropagation(source=kfax.ExactFisher()),
}


def case_with(block, loss="softmax"):
    case = make_case("attention", loss, num_examples=N)
    registry = kfax.default_registry.register(eqx.nn.Linear, lambda m: kfax.TaggedLinear(m, block=block))
    return case, kfax.tag(kfax.untag(case.model), registry=registry)


def splits():
    """One, three and seven parts of different sizes, in order and shuffled."""
    for shuffled in (False, True):
        order = np.random.default_rng(0).permutation(N) if shuffled else np.arange(N)
        for cuts in ([], [4, 12], [1, 5, 6, 10, 11, 15]):
            yield np.split(order, cuts)


def fold(update, estimator, model, parts, *arrays):
    """The state after all parts, each taken in by one update."""
    state = estimator.init(model)
    for part in parts:
        state = update(state, tuple(array[part] for array in arrays))
    return state


@grid(
    thin=2,
    slow=lambda name, weighted: not weighted and name not in ("expand", "full"),
    name=ESTIMATORS,
    weighted=[False, True],
)
def test_how_a_data_set_is_split_makes_no_difference(name, weighted):
    case, model = case_with(BLOCKS.get(name, kfax.Diagonal()))
    estimator = ESTIMATORS[name]
    weights = jnp.linspace(0.0, 2.0, N)

    def loss_fn(model, batch):
        x, y, w = batch
        return kfax.softmax_cross_entropy(jax.vmap(model)(x), y, weights=w if weighted else None)

    update = eqx.filter_jit(lambda s, batch: estimator.update(s, loss_fn, model, batch))
    states = [fold(update, estimator, model, parts, case.x, case.y, weights) for parts in splits()]
    for state in states[1:]:
        assert_close(state.average.value, states[0].average.value)
    assert_close(states[-1].average.weight, jnp.sum(weights) if weighted else jnp.asarray(float(N)))


def test_batches_without_any_example_that_counts_change_nothing():
    case, model = case_with(kfax.Full())
    estimator = ESTIMATORS["full"]

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1], mask=batch[2])

    mask = jnp.arange(N) < 12
    update = eqx.filter_jit(lambda s, batch: estimator.update(s, loss_fn, model, batch))
    everything = fold(update, estimator, model, [np.arange(N)], case.x, case.y, mask)
    parts = [np.arange(16, 20), np.arange(8), np.arange(12, 16), np.arange(8, 12)]
    split = fold(update, estimator, model, parts, case.x, case.y, mask)
    assert_close(split.average.value, everything.average.value)


@grid(
    slow=lambda loss, source, estimator: (
        loss != "softmax" or estimator == "blocks" and source not in ("ggn", "sampled")
    ),
    loss=LOSSES,
    source=SOURCES,
    estimator=["blocks", "explicit"],
)
def test_a_loss_times_c_has_curvature_times_c(loss, source, estimator):
    case = make_case("mlp", loss)
    make = {"blocks": kfax.BlockDiagonalCurvature, "explicit": kfax.ExplicitExactCurvature}[estimator]
    made, p = make(SOURCES[source]), parameters(case.model)

    @eqx.filter_jit
    def dense(c):
        loss_fn = lambda model, batch: c * case.loss_fn(model, batch)  # noqa: E731
        state = made.update(made.init(case.model), loss_fn, case.model, case.batch, key=jax.random.key(0))
        return made.to_dense(state, p)

    assert_close(dense(jnp.asarray(7.0)), 7 * dense(jnp.asarray(1.0)))

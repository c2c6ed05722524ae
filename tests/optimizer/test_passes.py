"""Batches that are run in parts, and batches that grow."""

import contextlib
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, make_case
from helpers import assert_close, mlp

import kfax


AUTO = kfax.QuadraticModel()
EXACT = kfax.BlockDiagonalCurvature(kfax.ExactGGN())


def adaptive(loss_fn, **options):
    settings = {
        "learning_rate": AUTO,
        "momentum": AUTO,
        "damping": kfax.LevenbergMarquardt(0.5, period=2),
        "rejection": kfax.Rejection(),
        "preconditioner": kfax.Preconditioner(EXACT, inverse_update_period=2),
        "l2": 1e-3,
    }
    return kfax.Optimizer(loss_fn, **(settings | options))


def train(optimizer, model, batches, **inputs):
    state = eqx.filter_jit(optimizer.init)(model, batches[0], **inputs)
    step, infos = eqx.filter_jit(optimizer.step), []
    for batch in batches:
        model, state, info = step(model, state, batch, **inputs)
        infos.append(info)
        inputs = inputs | ({"model_state": info.model_state} if info.model_state is not None else {})
    return model, state, infos


@grid(
    slow=lambda model, kind: (model, kind) not in (("mlp-scan", "adaptive"), ("mlp", "weights")),
    model=["mlp", "mlp-scan", "attention"],
    kind=["adaptive", "fixed", "weights"],
)
def test_micro_batches_are_the_batch(model, kind):
    """Loss, gradient, statistics, quadratic model and the loss after the step, each a mean over the parts."""
    options = {}
    if kind == "weights":
        options = {"weights": jnp.array([1.0, 2, 0, 1, 5, 1]), "mask": jnp.array([True, True, True, True, False, True])}
    case = make_case(model, "softmax")

    def loss_fn(model, batch):
        outputs = jax.vmap(model, axis_name="batch")(batch["x"])
        return kfax.softmax_cross_entropy(outputs, batch["y"], **batch["options"]), jnp.mean(outputs)

    batch = {"x": case.x, "y": case.y, "options": options, "name": "not an array"}
    settings = {"learning_rate": 0.1, "momentum": 0.5, "damping": 0.3} if kind == "fixed" else {}
    whole = train(adaptive(loss_fn, **settings), case.model, [batch] * 3)
    parts = train(adaptive(loss_fn, **settings, micro_batches=3), case.model, [batch] * 3)
    for one, other in zip(whole[2], parts[2], strict=True):
        assert other.aux.shape == (3,)
        assert_close(jnp.mean(other.aux), one.aux)
        assert_close(eqx.tree_at(lambda i: i.aux, other, 0), eqx.tree_at(lambda i: i.aux, one, 0), tolerance=1e-8)
    # Differences of losses enter λ; rounding errors grow from step to step.
    assert_close(parts[:2], whole[:2], tolerance=1e-8)


def test_a_model_state_is_handed_on_from_part_to_part():
    case = make_case("mlp", "squared")

    def loss_fn(model, batch, model_state, key):
        noise = jax.random.normal(key, ())
        outputs = jax.vmap(model)(batch[0]) + model_state["count"] * 0
        state = {"count": model_state["count"] + 1, "noise": noise, "name": "kept"}
        return kfax.squared_error(outputs, batch[1]), state, {"noise": noise, "text": "kept"}

    start = {"count": jnp.zeros(()), "noise": jnp.zeros(()), "name": "kept"}
    optimizer = adaptive(loss_fn, micro_batches=3)
    _, _, [info] = train(optimizer, case.model, [case.batch], key=jax.random.key(0), model_state=start)
    assert info.model_state["count"] == 3 and info.model_state["name"] == info.aux["text"] == "kept"
    assert jnp.unique(info.aux["noise"]).size == 3
    assert info.model_state["noise"] == info.aux["noise"][-1]


def test_what_cannot_be_split():
    case = make_case("mlp", "squared")
    step = eqx.filter_jit(adaptive(case.loss_fn, micro_batches=4).step)
    state = eqx.filter_jit(adaptive(case.loss_fn).init)(case.model, case.batch)
    with pytest.raises(ValueError, match="A batch of 6 examples cannot be split into `micro_batches=4` equal parts"):
        step(case.model, state, case.batch)
    with pytest.raises(ValueError, match=r"(?s)`micro_batches=4` splits a batch along axis 0.*`batch\[1\]`: 5"):
        step(case.model, state, (case.x, case.y[:5]))

    def heads(model, batch, weights):
        outputs = jax.vmap(model)(batch[0])
        return [kfax.squared_error(outputs, batch[1], weights=w) for w in (batch[2], weights(batch[2]))]

    batch = (*case.batch, jnp.arange(1.0, 7.0))
    for weights, expected in ((lambda w: w, None), (lambda w: w**2, "must have the same `weights` and `mask`")):
        optimizer = adaptive(functools.partial(heads, weights=weights), micro_batches=3)
        with contextlib.nullcontext() if expected is None else pytest.raises(ValueError, match=expected):
            eqx.filter_eval_shape(optimizer.step, case.model, state, batch)
    with pytest.raises(ValueError, match=r"`micro_batches` must be a whole number, at least 1, got 0"):
        adaptive(case.loss_fn, micro_batches=0)
    mask = jnp.arange(6) > 0

    def averaged(model, batch, *, means=(True, True)):
        outputs, part = jax.vmap(model)(batch[0]), mask[: len(batch[0])]  # the very same mask for both
        return [kfax.squared_error(outputs, batch[1], mask=part, mean_over_positions=mean) for mean in means]

    for means, expected in (((True, True), None), ((True, False), "and the same `mean_over_positions`")):
        optimizer = adaptive(functools.partial(averaged, means=means), micro_batches=3)
        with contextlib.nullcontext() if expected is None else pytest.raises(ValueError, match=expected):
            eqx.filter_eval_shape(optimizer.step, case.model, state, case.batch)
    implicit = kfax.Preconditioner(kfax.ImplicitExactCurvature())
    with pytest.raises(ValueError, match="`micro_batches` must be 1"):
        adaptive(case.loss_fn, micro_batches=2, preconditioner=implicit)


def test_parts_of_batches_take_turns_at_every_period():
    """With statistics at every other step the parts are those of the updates, or half of them would never be seen."""
    case = make_case(mlp(jax.random.key(0), (8, 3)), "squared", num_examples=12)
    batch = (jnp.arange(12.0)[:, None] * jnp.ones(8), case.y)
    preconditioner = kfax.Preconditioner(EXACT, curvature_update_period=2, batch=kfax.Fraction(1 / 4))
    optimizer = kfax.Optimizer(
        case.loss_fn, learning_rate=0.0, momentum=0.0, damping=1.0, preconditioner=preconditioner
    )
    _, state, _ = train(optimizer, case.model, [batch] * 8)
    [factors] = state.curvature.average.value.values()
    # Of four parts with a decay of 0.95, each once: the second moment of input 0.
    means = jnp.mean(jnp.arange(12.0).reshape(4, 3) ** 2, axis=1)
    weights = EXACT.decay ** jnp.arange(3, -1, -1)
    assert_close(factors.a[0, 0], jnp.sum(weights * means) / jnp.sum(weights))


def test_a_state_of_equinox_may_be_updated_outside_of_vmap():
    """Equinox invalidates a `State` when it is updated, and `loss_fn` is traced several times."""
    index = eqx.nn.StateIndex(jnp.zeros(()))
    case = make_case(mlp(jax.random.key(0), (8, 3)), "squared", num_examples=6)
    state = eqx.nn.State({"index": index})

    def loss_fn(model, batch, model_state):
        return case.loss_fn(model, batch), model_state.set(index, model_state.get(index) + 1)

    for micro_batches in (1, 3):
        optimizer = adaptive(loss_fn, micro_batches=micro_batches)
        _, _, infos = train(optimizer, case.model, [case.batch] * 2, model_state=state)
        assert infos[-1].model_state.get(index) == 2 * micro_batches


def test_a_batch_may_grow():
    """The state does not know the size of the batch. One compilation for each."""
    case = make_case(mlp(jax.random.key(0), (8, 3)), "squared", num_examples=12)
    sizes = [4, 4, 8, 12, 12]
    traces = []

    def loss_fn(model, batch):
        traces.append(len(batch[0]))
        return case.loss_fn(model, batch)

    batches = [jax.tree.map(lambda x, n=size: x[:n], case.batch) for size in sizes]
    model, state, infos = train(adaptive(loss_fn), case.model, batches)
    # `init` and the first step, and one more step for each other size.
    once = traces.count(8)
    assert traces.count(12) == once and traces[-once:] == [12] * once
    assert all(info.result == kfax.StepResult.successful for info in infos)
    # Each batch counts by its size in the average: 4, 4, 8, 12 and 12 examples with a decay of 0.95 a step.
    weights = [size * 0.95 ** (len(sizes) - 1 - i) for i, size in enumerate(sizes)]
    assert_close(state.curvature.average.weight, jnp.asarray(sum(weights)))
    assert infos[-1].loss < infos[-2].loss

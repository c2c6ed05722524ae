"""The step: its algebra, its independence of how it is run, and its parts."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import grid, make_case, MODELS
from helpers import assert_close, mlp, parameters
from jax.flatten_util import ravel_pytree
from reference import ggn

import kfax


def exact_ggn(period=3, source: Any = kfax.ExactGGN, **options):
    return kfax.Preconditioner(kfax.BlockDiagonalCurvature(source()), inverse_update_period=period, **options)


def adaptive(loss_fn, **options):
    settings = {
        "learning_rate": kfax.QuadraticModel(),
        "momentum": kfax.QuadraticModel(),
        "damping": kfax.LevenbergMarquardt(1.0, period=2),
        "preconditioner": exact_ggn(),
        "l2": 1e-3,
    }
    return kfax.Optimizer(loss_fn, **(settings | options))


def fixed(loss_fn, **options):
    settings = {"learning_rate": 0.1, "momentum": 0.9, "damping": 0.5}
    return adaptive(loss_fn, **(settings | options))


KINDS = {
    "adaptive": adaptive,
    "fixed": fixed,
    "scheduled": lambda f, **o: fixed(
        f,
        learning_rate=optax.cosine_decay_schedule(0.1, 10),
        momentum=optax.linear_schedule(0.0, 0.9, 5),
        damping=optax.exponential_decay(1.0, 3, 0.5),
        **o,
    ),
    "mixed": lambda f, **o: fixed(f, learning_rate=kfax.QuadraticModel(), damping=kfax.LevenbergMarquardt(1.0), **o),
    "amortized": lambda f, **o: fixed(
        f, preconditioner=exact_ggn(curvature_update_period=2), damping=kfax.LevenbergMarquardt(0.1, period=1), **o
    ),
    "random": lambda f, **o: adaptive(f, preconditioner=exact_ggn(source=kfax.SampledFisher), **o),
}


def begin(optimizer, case, **inputs):
    """The first state, without the check, which has tests of its own and takes a second."""
    return eqx.filter_jit(optimizer.init)(case.model, case.batch, **inputs)


def run(optimizer, case, steps=7):
    model, state = case.model, begin(optimizer, case)
    step, infos = eqx.filter_jit(optimizer.step), []
    for i in range(steps):
        model, state, info = step(model, state, case.batch, key=jax.random.key(i))
        infos.append(info)
    return model, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)


@grid(slow=lambda kind: kind == "adaptive", kind=["adaptive", "amortized"])
def test_eager_equals_jit(kind):
    case = make_case("mlp", "softmax", num_examples=9)
    optimizer = KINDS[kind](case.loss_fn)
    model, state, info = case.model, optimizer.init(case.model, case.batch), None
    for i in range(2):
        model, state, info = optimizer.step(model, state, case.batch, key=jax.random.key(i))
    expected_model, expected_state, infos = run(optimizer, case, steps=2)
    expected_info = jax.tree.map(lambda leaf: leaf[-1], infos)
    assert_close((model, state, info), (expected_model, expected_state, expected_info))


@grid(
    thin=2,
    slow=lambda kind, model: model == "attention" and kind not in ("adaptive", "amortized"),
    kind=KINDS,
    model=["mlp-scan", "attention"],
)
def test_jit_equals_scan(kind, model):
    case = make_case(model, "softmax", num_examples=9)
    optimizer = KINDS[kind](case.loss_fn)
    dynamic, static = eqx.partition(case.model, eqx.is_array)

    def body(carry, i):
        model, state = eqx.combine(carry[0], static), carry[1]
        model, state, info = optimizer.step(model, state, case.batch, key=jax.random.key(i))
        return (eqx.filter(model, eqx.is_array), state), info

    start = (dynamic, begin(optimizer, case))
    (dynamic, state), infos = eqx.filter_jit(lambda c: jax.lax.scan(body, c, jnp.arange(7)))(start)
    # Schedules of optax are computed in float32, which the two programs may round differently.
    tolerance = 1e-6 if kind == "scheduled" else None
    assert_close((eqx.combine(dynamic, static), state, infos), run(optimizer, case), tolerance=tolerance)


@grid(
    thin=2,
    slow=lambda kind, model: (kind, model) not in (("adaptive", "mlp"), ("amortized", "mlp-scan")),
    kind=["adaptive", "amortized", "random"],
    model=["mlp", "mlp-scan"],
)
def test_an_ensemble_equals_its_members(kind, model):
    case = make_case(model, "softmax")
    optimizer = KINDS[kind](case.loss_fn)
    keys = jax.random.split(jax.random.key(4), 8)
    make = lambda key: kfax.tag(MODELS[model](key, True))  # noqa: E731
    members = [make(key) for key in keys]
    models = eqx.filter_vmap(make)(keys)
    axes = optimizer.state_axes(eqx.filter_eval_shape(optimizer.init, members[0], case.batch))
    states = eqx.filter_vmap(optimizer.init, in_axes=(eqx.if_array(0), None), out_axes=axes)(models, case.batch)
    assert states.step.shape == ()
    step = eqx.filter_jit(
        eqx.filter_vmap(
            lambda m, s, k: optimizer.step(m, s, case.batch, key=k),
            in_axes=(eqx.if_array(0), axes, None),
            out_axes=(eqx.if_array(0), axes, 0),
        )
    )
    for i in range(5):
        models, states, _ = step(models, states, jax.random.key(i))
    for index, member in enumerate(members):
        state = eqx.filter_jit(optimizer.init)(member, case.batch)
        for i in range(5):
            member, state, _ = eqx.filter_jit(optimizer.step)(member, state, case.batch, key=jax.random.key(i))
        found = jax.tree.map(lambda x, index=index: x[index] if eqx.is_array(x) else x, models)
        assert_close(parameters(found), parameters(member))
        assert_close(states.damping[index], state.damping)
    assert states.step == 5


@pytest.mark.parametrize("rejection", [None, kfax.Rejection()])
def test_an_ensemble_refreshes_only_when_due(rejection):
    """With the counter unmapped the conditions stay conditions, instead of selects over both branches."""
    case = make_case("mlp", "softmax")
    optimizer = fixed(case.loss_fn, rejection=rejection)
    models = eqx.filter_vmap(lambda key: kfax.tag(MODELS["mlp"](key, True)))(jax.random.split(jax.random.key(1), 2))
    axes = optimizer.state_axes(eqx.filter_eval_shape(optimizer.init, case.model, case.batch))
    states = eqx.filter_vmap(optimizer.init, in_axes=(eqx.if_array(0), None), out_axes=axes)(models, case.batch)

    def lowered(axes):
        step = eqx.filter_vmap(
            optimizer.step, in_axes=(eqx.if_array(0), axes, None), out_axes=(eqx.if_array(0), axes, eqx.if_array(0))
        )
        dynamic, static = eqx.partition((models, states), eqx.is_array)
        return jax.make_jaxpr(lambda d: eqx.filter(step(*eqx.combine(d, static), case.batch), eqx.is_array))(dynamic)

    program = lowered(axes)
    assert "cholesky" in str(program)
    assert not any("cholesky" in str(equation) for equation in program.eqns if equation.primitive.name != "cond")


def test_a_sweep_over_dampings_made_inside_vmap():
    """State made inside the mapped function starts unmapped, and must not be summed over the sweep."""
    case = make_case("mlp", "softmax", num_examples=8)  # as many examples as members: the hard case

    def train(initial):
        optimizer = adaptive(case.loss_fn, damping=kfax.LevenbergMarquardt(initial))
        dynamic, static = eqx.partition(case.model, eqx.is_array)

        def body(carry, _):
            model, state, info = optimizer.step(eqx.combine(carry[0], static), carry[1], case.batch)
            return (eqx.filter(model, eqx.is_array), state), info.loss

        return jax.lax.scan(body, (dynamic, begin(optimizer, case)), None, length=4)[1]

    dampings, alone = jnp.geomspace(1e-2, 1e2, 8), eqx.filter_jit(train)
    assert_close(eqx.filter_jit(eqx.filter_vmap(train))(dampings), jnp.stack([alone(d) for d in dampings]))


def test_one_trace_with_moving_damping_and_learning_rate():
    case = make_case("mlp", "softmax")
    traces = []

    def loss_fn(model, batch):
        traces.append(0)
        return case.loss_fn(model, batch)

    state = eqx.filter_jit(fixed(loss_fn).init)(case.model, case.batch)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def step(optimizer, model, state, damping):
        return optimizer.step(model, state, case.batch, damping=damping)

    model, before = case.model, None
    for i in range(20):
        optimizer = fixed(loss_fn, learning_rate=0.1 / (i + 1), momentum=0.9 - 0.01 * i, damping=1.0 + i)
        model, state, info = step(optimizer, model, state, jnp.asarray(2.0 + i))
        assert_close(info.damping, jnp.asarray(2.0 + i))
        assert_close(info.learning_rate, jnp.asarray(0.1 / (i + 1)))
        before = len(traces) if before is None else before
    assert len(traces) == before
    assert state.step == 20


# -- algebra --


def quadratic_case(use_bias=True):
    """One dense layer and squared error: the loss is a quadratic function, and the GGN its Hessian."""
    return make_case(mlp(jax.random.key(2), (8, 3), use_bias=use_bias), "squared", num_examples=20)


def objective(case, l2):
    def value(flat):
        outputs = case.outputs(unravel(flat))
        return jnp.mean(jnp.sum((outputs - case.y) ** 2, axis=1)) + l2 / 2 * flat @ flat

    flat, unravel = ravel_pytree(parameters(case.model))
    return value, flat


def test_two_directions_reach_the_minimum_of_their_plane():
    case = quadratic_case()
    optimizer = adaptive(case.loss_fn, damping=1e-12, l2=1e-2, preconditioner=exact_ggn(1))
    # λ enters the plane's model; this one is negligible there, and given to the preconditioner at each step.
    value, _ = objective(case, 1e-2)
    model, state = case.model, begin(optimizer, case)
    for _ in range(4):
        before = ravel_pytree(parameters(model))[0]
        velocity = ravel_pytree(state.velocity)[0]
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch)
        after = ravel_pytree(parameters(model))[0]
        gradient = jax.grad(value)(after)
        direction = (after - before - info.momentum * velocity) / info.learning_rate
        scale = jnp.linalg.norm(jax.grad(value)(before))
        for v in (direction, velocity):
            assert abs(gradient @ v) <= 1e-9 * scale * (jnp.linalg.norm(v) + 1e-300)
        # The change is a difference of two larger numbers.
        assert_close(info.predicted_change, value(after) - value(before), tolerance=1e-8)
        if jnp.linalg.norm(gradient) < 1e-9:
            break


@grid(use_bias=[True, False], source=["ExactGGN", "many samples"])
def test_one_undamped_step_solves_a_regression(use_bias, source):
    """Exact case 6: one dense layer with squared error."""
    case = quadratic_case(use_bias)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    if source != "ExactGGN":
        # G is a multiple of the identity whatever is sampled only in the mean: another preconditioner, no solution.
        estimator = kfax.BlockDiagonalCurvature(kfax.SampledFisher(3))
    optimizer = fixed(
        case.loss_fn,
        learning_rate=1.0,
        momentum=0.0,
        damping=1e-12,
        l2=0.0,
        preconditioner=kfax.Preconditioner(estimator),
    )
    state = begin(optimizer, case)
    model, _, info = eqx.filter_jit(optimizer.step)(case.model, state, case.batch, key=jax.random.key(0))
    value, _ = objective(case, 0.0)
    after = jnp.linalg.norm(jax.grad(value)(ravel_pytree(parameters(model))[0])) / info.gradient_norm
    # The damping leaves about its square root, 1e-6.
    assert (after < 1e-4) == (source == "ExactGGN")


@grid(thin=2, learning_rate=["model", 0.3], momentum=["model", 0.5])
def test_coefficients_minimize_the_damped_model_and_the_ratio_compares(learning_rate, momentum):
    """Against a dense computation of the whole step on a nonlinear network."""
    case = make_case("mlp", "softmax", num_examples=9)
    lam, l2 = 0.2, 0.05
    pick = lambda c: kfax.QuadraticModel() if c == "model" else c  # noqa: E731
    optimizer = adaptive(
        case.loss_fn,
        learning_rate=pick(learning_rate),
        momentum=pick(momentum),
        damping=kfax.LevenbergMarquardt(lam, period=1, decay=0.9),
        l2=l2,
        preconditioner=exact_ggn(1),
    )
    model, state = case.model, begin(optimizer, case)
    flat, unravel = ravel_pytree(parameters(model))

    def value(flat):
        return jnp.mean(jax.vmap(case.one)(case.outputs(unravel(flat)), case.y)) + l2 / 2 * flat @ flat

    for i in range(3):
        theta, lam = ravel_pytree(parameters(model))[0], state.damping
        velocity = ravel_pytree(state.velocity)[0]
        gradient = jax.grad(value)(theta)
        estimator = optimizer.estimator
        curvature = eqx.filter_jit(estimator.update)(state.curvature, case.loss_fn, model, case.batch)
        curvature = eqx.filter_jit(estimator.refresh)(curvature, parameters(model), lam + l2)
        descent = -ravel_pytree(estimator.solve(curvature, unravel(gradient)))[0]
        matrix = ggn(case.outputs, unravel(theta), case.one, case.y) + l2 * jnp.eye(theta.size)
        damped = matrix + lam * jnp.eye(theta.size)
        basis = jnp.stack([descent, velocity], axis=1)
        q, b = basis.T @ damped @ basis, basis.T @ gradient
        if learning_rate == momentum == "model":
            expected = -jnp.linalg.lstsq(q, b)[0] if i == 0 else -jnp.linalg.solve(q, b)
        elif learning_rate == "model":
            expected = jnp.array([-(b[0] + q[0, 1] * 0.5) / q[0, 0], 0.5])
        elif momentum == "model":
            expected = jnp.array([0.3, 0.0 if i == 0 else -(b[1] + q[0, 1] * 0.3) / q[1, 1]])
        else:
            expected = jnp.array([0.3, 0.5])
        step = basis @ expected
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch)
        # The two directions are nearly dependent: their 2x2 system, and what follows from it, is ill-conditioned.
        assert_close(jnp.stack([info.learning_rate, info.momentum]), expected, tolerance=1e-8)
        assert_close(ravel_pytree(parameters(model))[0], theta + step)
        assert_close(info.loss, value(theta))
        assert_close(info.gradient_norm, jnp.linalg.norm(gradient))
        assert_close(info.update_norm, jnp.linalg.norm(step), tolerance=1e-8)
        if learning_rate == "model" or momentum == "model":
            model_matrix = matrix
        else:
            model_matrix = estimator.to_dense(curvature, parameters(model)) + l2 * jnp.eye(theta.size)
        predicted = gradient @ step + step @ model_matrix @ step / 2
        assert_close(info.predicted_change, predicted, tolerance=1e-8)
        ratio = (value(theta + step) - value(theta)) / predicted
        assert_close(info.reduction_ratio, ratio, tolerance=1e-7)
        factor = 0.9 if ratio > 0.75 else (1 / 0.9 if ratio < 0.25 else 1.0)
        assert_close(state.damping, lam * factor)


def test_fixed_coefficients_follow_the_formula():
    case = quadratic_case()
    l2 = 1e-2
    optimizer = fixed(case.loss_fn, l2=l2, preconditioner=exact_ggn(1))
    value, flat = objective(case, l2)
    _, unravel = ravel_pytree(parameters(case.model))
    model, state = case.model, begin(optimizer, case)
    velocity = jnp.zeros_like(flat)
    for _ in range(3):
        theta = ravel_pytree(parameters(model))[0]
        curvature = eqx.filter_jit(optimizer.estimator.update)(state.curvature, case.loss_fn, model, case.batch)
        curvature = optimizer.estimator.refresh(curvature, parameters(model), jnp.asarray(0.5 + l2))
        natural = optimizer.estimator.solve(curvature, unravel(jax.grad(value)(theta)))
        velocity = -0.1 * ravel_pytree(natural)[0] + 0.9 * velocity
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch)
        assert_close(ravel_pytree(parameters(model))[0], theta + velocity)
        assert jnp.isnan(info.predicted_change) and jnp.isnan(info.reduction_ratio)


def test_levenberg_marquardt_moves_as_the_paper_says():
    rule = kfax.LevenbergMarquardt(1.0, decay=0.95, period=5, minimum=0.5, maximum=1.2)
    factor = 0.95**5
    for ratio, expected in [(0.76, factor), (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.24, 1.2), (-3.0, 1.2)]:
        assert_close(rule.update(jnp.asarray(1.0), jnp.asarray(ratio)), jnp.asarray(expected))
    assert rule.update(jnp.asarray(1.0), jnp.asarray(jnp.nan)) == 1.2
    assert rule.update(jnp.asarray(0.5), jnp.asarray(1.0)) == 0.5
    assert [bool(rule.wants_ratio(jnp.asarray(i))) for i in range(6)] == [False] * 4 + [True, False]


def test_inverses_change_only_when_due():
    case = make_case("mlp", "softmax")
    optimizer = fixed(case.loss_fn, preconditioner=exact_ggn(curvature_update_period=2))
    model, state = case.model, begin(optimizer, case)
    for i in range(7):
        previous = state.curvature
        model, state, _ = eqx.filter_jit(optimizer.step)(model, state, case.batch)
        assert bool(eqx.tree_equal(state.curvature.inverses, previous.inverses)) == (i % 3 != 0)
        assert bool(eqx.tree_equal(state.curvature.average, previous.average)) == (i % 2 != 0)


def test_values_given_at_the_step_win():
    case = make_case("mlp", "softmax")
    everywhere = {"learning_rate": 0.05, "momentum": 0.3, "damping": 2.0}
    expected = run(fixed(case.loss_fn, **everywhere), case, steps=3)[0]
    for kind in ("adaptive", "scheduled"):
        optimizer = KINDS[kind](case.loss_fn)
        model, state = case.model, begin(optimizer, case)
        for _ in range(3):
            model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch, **everywhere)
            assert_close(info.learning_rate, jnp.asarray(0.05))
        assert_close(parameters(model), parameters(expected))


def test_schedules_see_the_step():
    case = make_case("mlp", "softmax")
    _, _, infos = run(KINDS["scheduled"](case.loss_fn), case)
    steps = jnp.arange(7)
    # optax computes its schedules partly in float32.
    assert_close(infos.learning_rate, jax.vmap(optax.cosine_decay_schedule(0.1, 10))(steps), tolerance=1e-6)
    assert_close(infos.momentum, jax.vmap(optax.linear_schedule(0.0, 0.9, 5))(steps), tolerance=1e-6)
    assert_close(infos.damping, jax.vmap(optax.exponential_decay(1.0, 3, 0.5))(steps), tolerance=1e-6)


# -- parts --


def test_l2_touches_what_it_is_told_to():
    case = make_case("mlp", "softmax")
    where = lambda m: [layer.weight for layer in m.layers if isinstance(layer, kfax.TaggedLinear)]  # noqa: E731
    optimizer = fixed(case.loss_fn, l2=kfax.L2(0.5, where))
    model, state = case.model, begin(optimizer, case)
    _, _, info = eqx.filter_jit(optimizer.step)(model, state, case.batch)
    plain = case.loss_fn(model, case.batch).value()
    weights = sum(jnp.sum(leaf**2) for leaf in where(model))
    assert_close(info.loss, plain + 0.25 * weights)


def test_frozen_parameters_stay():
    case = make_case("mlp", "softmax")
    frozen = lambda m: [m.layers[0], m.layers[2].bias]  # noqa: E731
    optimizer = adaptive(case.loss_fn, frozen=frozen)
    model, _, _ = run(optimizer, case, steps=4)
    for before, after in zip(jax.tree.leaves(frozen(case.model)), jax.tree.leaves(frozen(model)), strict=True):
        assert jnp.array_equal(before, after)
    assert not jnp.array_equal(model.layers[2].weight, case.model.layers[2].weight)
    assert not jnp.array_equal(model.layers[4].weight, case.model.layers[4].weight)


def test_keys_aux_and_model_state_go_through():
    case = make_case("mlp", "softmax")

    def loss_fn(model, batch, model_state, *, key):
        noise = 0.1 * jax.random.normal(key, batch[0].shape)
        outputs = jax.vmap(model)(batch[0] + noise)
        return kfax.softmax_cross_entropy(outputs, batch[1]), model_state + 1, {"mean": outputs.mean()}

    optimizer = adaptive(loss_fn)
    state = begin(optimizer, case, key=jax.random.key(0), model_state=jnp.array(3))
    step = functools.partial(eqx.filter_jit(optimizer.step), case.model, state, case.batch, model_state=jnp.array(3))
    first, again, other = (step(key=jax.random.key(i)) for i in (1, 1, 2))
    assert first[2].model_state == 4
    assert first[2].aux["mean"].shape == ()
    assert_close(first, again, tolerance=0.0)
    assert not jnp.array_equal(first[2].loss, other[2].loss)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_keep_their_dtype(dtype):
    case = make_case("mlp", "softmax", num_examples=9)
    model = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, case.model)
    batch = (case.x.astype(dtype), case.y)
    optimizer = adaptive(case.loss_fn)
    state = eqx.filter_jit(optimizer.init)(model, batch)
    losses = []
    for _ in range(10):
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, batch)
        losses.append(float(info.loss))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(parameters(model)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.curvature.average.value))
    assert losses[-1] < losses[0]


def test_state_survives_a_file(tmp_path):
    case = make_case("mlp", "softmax")
    optimizer = adaptive(case.loss_fn)
    model, state, _ = run(optimizer, case, steps=3)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", (model, state))
    like = (case.model, begin(optimizer, case))
    model2, state2 = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    step = eqx.filter_jit(optimizer.step)
    assert eqx.tree_equal(step(model, state, case.batch), step(model2, state2, case.batch))


def test_batch_sharded_over_four_devices_gives_the_same_step():
    case = make_case("attention", "softmax", num_examples=8)
    optimizer = adaptive(case.loss_fn)
    state = begin(optimizer, case)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(case.batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    step = eqx.filter_jit(optimizer.step)
    one, four = step(case.model, state, case.batch), step(case.model, state, sharded)
    assert_close(parameters(four[0]), parameters(one[0]))
    assert_close(four[2], one[2])


def test_a_state_may_be_donated():
    case = make_case("mlp", "softmax")
    optimizer = adaptive(case.loss_fn)
    expected = run(optimizer, case, steps=3)[0]

    def step(kept, model, state):
        optimizer, batch = kept
        return optimizer.step(model, state, batch)[:2]

    copies = lambda tree: jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, tree)  # noqa: E731
    model, state = copies(case.model), optimizer.init(case.model, case.batch)
    for _ in range(3):
        old = state
        model, state = eqx.filter_jit(step, donate="all-except-first")((optimizer, case.batch), model, state)
        assert old.damping.is_deleted()
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter(optimizer, eqx.is_array)))
    assert_close(parameters(model), parameters(expected))

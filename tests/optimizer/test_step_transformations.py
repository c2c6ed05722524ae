"""A step is the same however it is run: eagerly, by jit, scan and vmap, on several devices, with donated state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, make_case, MODELS
from helpers import assert_close, parameters
from optimizer_cases import adaptive, begin, fixed, KINDS, run

import kfax


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

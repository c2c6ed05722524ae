"""Adam in the eigenbases of blocks, against the same written out with the dense matrices."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import make_case
from helpers import assert_close, mlp, parameters
from optimizer_cases import begin
from reference import jacobians, output_hessians

import kfax


RATE, DECAY, B1, B2, LAMBDA, EPSILON, LIMIT, PERIOD = 0.03, 0.6, 0.9, 0.8, 1e-4, 0.02, 0.95, 2


def make(loss_fn, period=PERIOD, source: kfax.CurvatureSource = kfax.ExactGGN(), **options):
    estimator = kfax.BlockDiagonalCurvature(source, decay=DECAY)
    adam = kfax.EigenbasisAdam(estimator, period=period, b1=B1, b2=B2, limit=LIMIT, relative_damping=EPSILON)
    settings = {"learning_rate": RATE, "momentum": 0.0, "damping": LAMBDA, "preconditioner": adam}
    return kfax.Optimizer(loss_fn, **(settings | options))


def train(optimizer, case, steps, **inputs):
    model, state = case.model, begin(optimizer, case)
    step, history = eqx.filter_jit(optimizer.step), []
    for i in range(steps):
        model, state, info = step(model, state, case.batch, key=jax.random.key(i), **inputs)
        history.append((model, state, info))
    return history


def several(rows, decay):
    """The weighted mean of what came, the last one with a weight of one."""
    weights = [decay ** (len(rows) - 1 - i) for i in range(len(rows))]
    return sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)


def kronecker_factors(case, layers):
    """A and G of every layer of an MLP, for the exact GGN."""
    a, factors = case.x, []
    hessians = output_hessians(case.one, forward(layers, case.x), case.y)
    for i, (weight, bias) in enumerate(layers):

        def outputs(shift, i=i):
            changed = [(w, b + shift if j == i else b) for j, (w, b) in enumerate(layers)]
            return forward(changed, case.x)

        j = jacobians(outputs, jnp.zeros_like(bias))
        rows = jnp.concatenate([a, jnp.ones((len(a), 1))], axis=1)
        factors.append((rows.T @ rows / len(a), jnp.einsum("nci,ncd,ndj->ij", j, hessians, j) / len(a)))
        a = jnp.tanh(a @ weight.T + bias)
    return factors


def forward(layers, x):
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight.T + bias)
    return x @ layers[-1][0].T + layers[-1][1]


def layers_of(model):
    return [(layer.weight, layer.bias) for layer in model.layers if hasattr(layer, "weight")]


class Reference:
    """The state of one matrix whose block has a dense basis `U`, `(d, d)`, that acts on it raveled."""

    def __init__(self):
        self.gradients, self.squares, self.is_limited = [], [], False

    def direction(self, basis, gradient):
        g = gradient.reshape(-1)
        self.gradients.append(g)
        self.squares.append((basis.T @ g) ** 2)
        ahead = several([*self.gradients, g], B1)
        squares = several(self.squares, B2)
        numbers = (basis.T @ ahead) / jnp.sqrt(squares + EPSILON * jnp.mean(squares) + LAMBDA)
        self.is_limited |= bool(jnp.any(jnp.abs(numbers) > LIMIT))
        return (basis @ jnp.clip(numbers, -LIMIT, LIMIT)).reshape(gradient.shape)


def power_step(factor, basis):
    """By Gram and Schmidt, whose signs are the diagonal's of R: no direction depends on them."""
    columns = []
    for column in (factor @ basis).T:
        for other in [*columns, *columns]:  # twice, since of a singular factor the last columns are rounding errors
            column = column - (other @ column) * other
        columns.append(column / jnp.linalg.norm(column))
    return jnp.stack(columns, axis=1)


@pytest.mark.parametrize("steps", [5])
def test_steps_are_those_of_adam_in_the_eigenbasis(steps):
    case = make_case("mlp", "softmax", num_examples=40)
    found = [model for model, _, _ in train(make(case.loss_fn), case, steps)]
    layers, references, means, bases = layers_of(case.model), [], [], []
    references = [Reference() for _ in layers]
    for i in range(steps):
        if i % PERIOD == 0:
            means.append(kronecker_factors(case, layers))
            now = [tuple(several([m[k][j] for m in means], DECAY) for j in range(2)) for k in range(len(layers))]
            if i == 0:
                bases = [tuple(jnp.linalg.eigh(f)[1][:, ::-1] for f in pair) for pair in now]
            else:
                bases = [tuple(map(power_step, pair, basis)) for pair, basis in zip(now, bases, strict=True)]
        objective = lambda layers: jnp.mean(jax.vmap(case.one)(forward(layers, case.x), case.y))  # noqa: E731
        gradients = jax.grad(objective)(layers)
        new = []
        for (weight, bias), (dw, db), (a, g), ref in zip(layers, gradients, bases, references, strict=True):
            step = -RATE * ref.direction(jnp.kron(g, a), jnp.concatenate([dw, db[:, None]], axis=1))
            new.append((weight + step[:, :-1], bias + step[:, -1]))
        layers = new
        assert_close(layers_of(found[i]), layers)
    assert all(ref.is_limited for ref in references)


def test_one_basis_for_all_numbers_of_a_layer():
    case = make_case(mlp(jax.random.key(0), (8, 3)), "softmax", num_examples=40)
    model = kfax.tag(kfax.untag(case.model), registry=kfax.Registry({eqx.nn.Linear: _full}))
    optimizer = make(case.loss_fn, period=10)
    state = eqx.filter_jit(optimizer.init)(model, case.batch)
    layers, ref, basis = layers_of(case.model), Reference(), None
    of = lambda v: [(v[:, :-1], v[:, -1])]  # noqa: E731
    for i in range(3):
        model, state, _ = eqx.filter_jit(optimizer.step)(model, state, case.batch, key=jax.random.key(i))
        together = jnp.concatenate([layers[0][0], layers[0][1][:, None]], axis=1)
        if i == 0:
            j = jacobians(lambda v: forward(of(v), case.x), together)
            hessians = output_hessians(case.one, forward(layers, case.x), case.y)
            basis = jnp.linalg.eigh(jnp.einsum("nci,ncd,ndj->ij", j, hessians, j))[1]
        gradient = jax.grad(lambda v: jnp.mean(jax.vmap(case.one)(forward(of(v), case.x), case.y)))(together)
        layers = of(together - RATE * ref.direction(basis, gradient))
        assert_close(layers_of(model), layers)


def _full(module):
    return kfax.TaggedLinear(module, block=kfax.Full())


def _diagonal(module):
    return kfax.TaggedLinear(module, block=kfax.Diagonal())


def test_without_a_basis_it_is_adam():
    case = make_case("mlp", "softmax")
    model = kfax.tag(kfax.untag(case.model), registry=kfax.Registry({eqx.nn.Linear: _diagonal}))
    adam = kfax.EigenbasisAdam(period=3, b1=0.0, b2=B2, limit=100.0, relative_damping=0.0)
    link = kfax.scale_by_curvature(case.loss_fn, damping=LAMBDA, preconditioner=adam)
    expected = optax.scale_by_adam(b1=0.0, b2=B2, eps=0.0, eps_root=LAMBDA)
    state, other = link.init(parameters(model)), expected.init(parameters(model))
    update = eqx.filter_jit(link.update)
    for i in range(5):
        gradients = eqx.filter_grad(lambda m: case.loss_fn(m, case.batch).value())(model)
        updates, state = update(gradients, state, None, model=model, batch=case.batch, key=jax.random.key(i))
        wanted, other = expected.update(gradients, other)
        assert_close(updates, wanted)
        model = eqx.apply_updates(model, jax.tree.map(lambda u: -0.1 * u, updates))


@pytest.mark.parametrize("kind", ["mlp-scan", "attention", "reused"])
def test_a_chain_is_the_optimizer(kind):
    """And with weight decay from optax."""
    case = make_case(kind, "softmax", num_examples=12)
    found = train(make(case.loss_fn, weight_decay=0.3), case, 5)
    adam = make(case.loss_fn).preconditioner
    chain = optax.chain(
        kfax.scale_by_curvature(case.loss_fn, damping=LAMBDA, preconditioner=adam),
        optax.add_decayed_weights(0.3),
        optax.scale_by_learning_rate(RATE),
    )
    model, state = case.model, chain.init(parameters(case.model))

    @eqx.filter_jit
    def step(model, state, key):
        gradients = eqx.filter_grad(lambda model: case.loss_fn(model, case.batch).value())(model)
        updates, state = chain.update(gradients, state, parameters(model), model=model, batch=case.batch, key=key)
        return eqx.apply_updates(model, updates), state

    for i, (expected, _, info) in enumerate(found):
        model, state = step(model, state, jax.random.key(i))
        assert info.result == kfax.StepResult.successful
        assert_close(parameters(model), parameters(expected))
    assert found[-1][2].loss < found[0][2].loss


def test_bases_are_orthogonal_and_turn_once_in_a_period():
    case = make_case("attention", "softmax", num_examples=12)
    history = train(make(case.loss_fn, period=3), case, 7)
    bases = [state.preconditioner.bases for _, state, _ in history]
    for several in bases[-1].values():
        for q in several:
            assert_close(q.mT @ q, jnp.broadcast_to(jnp.eye(q.shape[-1]), q.shape))
    turned = [not bool(eqx.tree_equal(new, old)) for old, new in zip(bases, bases[1:], strict=False)]
    assert turned == [False, False, True, False, False, True]
    assert not any(bool(state.preconditioner.is_stale) for _, state, _ in history)


def test_repeated_turns_diagonalize():
    case = make_case(mlp(jax.random.key(0), (8, 5, 3)), "softmax", num_examples=40)
    optimizer = make(case.loss_fn, period=1, learning_rate=0.0)
    state = train(optimizer, case, 1)[-1][1]
    factors = state.curvature.average.value
    # From a basis that is none of theirs.
    mixed = lambda q: jnp.linalg.qr(q + jnp.cos(jnp.arange(q.size)).reshape(q.shape))[0]  # noqa: E731
    bases = jax.tree.map(mixed, state.preconditioner.bases)
    state = eqx.tree_at(lambda s: s.preconditioner.bases, state, bases)
    step = eqx.filter_jit(optimizer.step)
    for i in range(300):
        _, state, _ = step(case.model, state, case.batch, key=jax.random.key(i))
    for key, (left, right) in state.preconditioner.bases.items():
        for matrix, q in ((factors[key].g, left), (factors[key].a, right)):
            values = jnp.linalg.eigvalsh(matrix)[::-1]
            # Neighbours are told apart by the ratio of their eigenvalues to the power of 300.
            assert_close(q.T @ matrix @ q, jnp.diag(values), 1e-2)


def test_a_batch_that_is_not_finite_changes_nothing():
    case = make_case("mlp", "softmax", num_examples=12)
    optimizer = make(case.loss_fn)
    model, state, _ = train(optimizer, case, 2)[-1]
    step = eqx.filter_jit(optimizer.step)
    bad = (case.x.at[0, 0].set(jnp.nan), case.y)
    after, new, info = step(model, state, bad, key=jax.random.key(0))
    assert info.result == kfax.StepResult.non_finite_batch
    assert bool(eqx.tree_equal(after, model))
    for name in ("first", "second"):
        assert bool(eqx.tree_equal(getattr(new.preconditioner, name), getattr(state.preconditioner, name)))
    # At the very first step there is no basis yet: the next one makes it.
    state = begin(optimizer, case)
    model, state, info = step(case.model, state, bad, key=jax.random.key(0))
    assert bool(state.preconditioner.is_stale)
    model, state, info = step(model, state, case.batch, key=jax.random.key(0))
    assert info.result == kfax.StepResult.successful and not bool(state.preconditioner.is_stale)
    expected, *_ = train(optimizer, case, 1)[-1]
    assert_close(parameters(model), parameters(expected))


def test_a_refresh_on_demand_is_in_full():
    case = make_case(mlp(jax.random.key(0), (8, 5, 3)), "softmax", num_examples=40)
    optimizer = make(case.loss_fn, period=100)
    state = eqx.filter_jit(optimizer.burn_in)(case.model, begin(optimizer, case), case.batch)
    state = eqx.filter_jit(optimizer.refresh)(case.model, state)
    for key, (left, right) in state.preconditioner.bases.items():
        factors = state.curvature.average.value[key]
        for matrix, q in ((factors.g, left), (factors.a, right)):
            assert_close(q.T @ matrix @ q, jnp.diag(jnp.linalg.eigvalsh(matrix)[::-1]))


def test_an_ensemble_is_its_members():
    case = make_case("mlp", "softmax", num_examples=12)
    optimizer = make(case.loss_fn)
    scaled = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]) if eqx.is_array(x) else x, case.model)
    state = begin(optimizer, case)
    axes = optimizer.state_axes(state)
    members = eqx.if_array(0)
    states = eqx.filter_vmap(lambda m: optimizer.init(m, case.batch), in_axes=(members,), out_axes=axes)(scaled)
    one = lambda m, s, key: optimizer.step(m, s, case.batch, key=key)  # noqa: E731
    step = eqx.filter_jit(eqx.filter_vmap(one, in_axes=(members, axes, None), out_axes=(members, axes, members)))
    info: Any = None
    for i in range(3):
        scaled, states, info = step(scaled, states, jax.random.key(i))
    expected = train(optimizer, case, 3)[-1]
    first = jax.tree.map(lambda x: x[0], parameters(scaled))
    assert_close(first, parameters(expected[0]))
    assert bool(jnp.all(info.result == kfax.StepResult.successful))


def test_micro_batches_and_frozen_parts():
    case = make_case("mlp", "softmax", num_examples=12)
    frozen = lambda model: model.layers[0]  # noqa: E731
    whole = train(make(case.loss_fn, frozen=frozen), case, 3)[-1]
    parts = train(make(case.loss_fn, frozen=frozen, micro_batches=3), case, 3)[-1]
    assert_close(parameters(parts[0]), parameters(whole[0]))
    assert bool(eqx.tree_equal(whole[0].layers[0], case.model.layers[0]))
    assert not bool(eqx.tree_equal(whole[0].layers[2], case.model.layers[2]))


def test_half_precision_has_averages_in_float32():
    case = make_case(mlp(jax.random.key(0), (8, 5, 3), dtype=jnp.bfloat16), "softmax", num_examples=12)
    batch = (case.x.astype(jnp.bfloat16), case.y)
    optimizer = make(case.loss_fn, source=kfax.SampledFisher(), learning_rate=0.1)
    model, state = case.model, eqx.filter_jit(optimizer.init)(case.model, batch)
    losses = []
    for i in range(20):
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, batch, key=jax.random.key(i))
        losses.append(float(info.loss))
    averages = (state.preconditioner.first.value, state.preconditioner.second.value, state.preconditioner.bases)
    assert {leaf.dtype for leaf in jax.tree.leaves(averages)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(model))} == {jnp.dtype(jnp.bfloat16)}
    assert losses[-1] < 0.5 * losses[0]


def test_mistakes():
    case = make_case("mlp", "softmax")
    mesh = jax.make_mesh((2,), ("data",))
    with pytest.raises(ValueError, match="give its estimator no `placement`"):
        kfax.EigenbasisAdam(kfax.BlockDiagonalCurvature(placement=kfax.Placement(mesh)))
    with pytest.raises(ValueError, match="`b2` must be"):
        kfax.EigenbasisAdam(b2=1.5)
    with pytest.raises(ValueError, match="`limit` must be"):
        kfax.EigenbasisAdam(limit=0.0)
    with pytest.raises(ValueError, match="`kfax.RelativeDamping` knows nothing"):
        make(case.loss_fn, damping=kfax.RelativeDamping(1.0))
    with pytest.raises(ValueError, match="`kfax.RelativeDamping` knows nothing"):
        adam = kfax.EigenbasisAdam()
        kfax.scale_by_curvature(case.loss_fn, damping=kfax.RelativeDamping(1.0), preconditioner=adam)
    corrected = kfax.set_block(case.model, lambda m: m.layers[2], kfax.EigenvalueCorrected())
    with pytest.raises(ValueError, match=r"`\.layers\[2\]` has the block EigenvalueCorrected.*`kfax.set_block`"):
        make(case.loss_fn).init(corrected, case.batch)

"""What a user decides: blocks by path or function, frozen parts, sizes of factors, masks; and modules of any kind."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close, mlp, parameters
from jax.flatten_util import ravel_pytree
from reference import block_diagonal, ggn, kronecker, softmax_loss, squared_loss

import kfax
from kfax._layers import parts


KEYS = jax.random.split(jax.random.key(0), 8)


def update(model, loss_fn, batch, source=None, frozen=None, example_axis=None):
    estimator = kfax.BlockDiagonalCurvature(source or kfax.ExactGGN(), example_axis=example_axis)
    run = eqx.filter_jit(lambda m, b: estimator.update(estimator.init(m, frozen=frozen), loss_fn, m, b, frozen=frozen))
    return estimator, run(model, batch)


def squared(model, batch):
    return kfax.squared_error(jax.vmap(model, axis_name="batch")(batch[0]), batch[1])


# -- choosing blocks --


@pytest.mark.parametrize(
    "where",
    [lambda m: m.layers[2], lambda m: [m.layers[2]], lambda m: m.layers[2:3], ".layers[2]"],
    ids=["node", "list", "container", "path"],
)
def test_set_block(where):
    model = kfax.tag(mlp(KEYS[0], (4, 3, 3, 2)))
    changed = kfax.set_block(model, where, kfax.Full())
    assert [layer.block for layer in changed.layers[::2]] == [model.layers[0].block, kfax.Full(), model.layers[4].block]
    assert eqx.tree_equal(kfax.untag(changed), kfax.untag(model))


def test_set_block_for_everything_inside():
    model = kfax.tag({"a": mlp(KEYS[0], (4, 3, 3)), "b": eqx.nn.Linear(3, 2, key=KEYS[1])})
    for where in (lambda m: m["a"], "['a']"):
        changed = kfax.set_block(model, where, kfax.Diagonal())
        assert [row.block for row in kfax.coverage(changed).rows] == ["Diagonal()"] * 2 + [
            "KroneckerFactored(Expand())"
        ]


def test_blocks_of_a_layer_with_several_operations():
    model = kfax.tag({"cell": eqx.nn.GRUCell(2, 3, key=KEYS[0])})
    blocks = {"input": kfax.KroneckerFactored(), "hidden": kfax.Diagonal(), "candidate": kfax.Full()}
    changed = kfax.set_block(model, "['cell']", blocks)
    assert [(row.path, row.block) for row in kfax.coverage(changed).rows] == [
        ("['cell']/input", "KroneckerFactored(Expand())"),
        ("['cell']/hidden", "Diagonal()"),
        ("['cell']/candidate", "Full()"),
    ]
    with pytest.raises(ValueError, match="a block for each of .'candidate', 'hidden', 'input'., got one for each of"):
        kfax.set_block(model, "['cell']", {"input": kfax.Diagonal()})
    with pytest.raises(ValueError, match=r"one of several operations.*blocks for all of \['input', 'hidden', 'cand"):
        kfax.set_block(model, "['cell']/input", kfax.Diagonal())
    with pytest.raises(ValueError, match=r"at no place: was it given to `kfax\.tag`"):
        kfax.set_block(kfax.untag(model), lambda m: m, kfax.Diagonal())


@pytest.mark.parametrize("where", [".layers[7]", ".layer", lambda m: m.layers[1], lambda m: []], ids=range(4))
def test_set_block_must_select_tagged_layers(where):
    model = kfax.tag(mlp(KEYS[0], (4, 3, 2)))
    with pytest.raises(ValueError, match=r"must select tagged layers.*`.layers\[0\]`, `.layers\[2\]`"):
        kfax.set_block(model, where, kfax.Diagonal())


def test_a_block_that_does_not_fit():
    model = kfax.tag({"norm": eqx.nn.LayerNorm(4)})
    wrong = kfax.set_block(model, "['norm']", kfax.KroneckerFactored())

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(model["norm"])(batch), batch)

    with pytest.raises(ValueError, match=r"(?s)layer at `\['norm'\]` cannot be estimated.*nothing to factor.*UnitWise"):
        update(wrong, loss_fn, jnp.ones((3, 4)))


def test_a_transposed_use_needs_a_block_for_it():
    pair = (
        kfax.TaggedEmbedding(eqx.nn.Embedding(5, 3, key=KEYS[0])),
        eqx.nn.Linear(3, 5, use_bias=False, key=KEYS[1]),
    )
    model = kfax.tag(eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight))

    def loss_fn(model, batch):
        def one(token):
            embedding, head = model()
            return head(embedding(token))

        return kfax.softmax_cross_entropy(jax.vmap(one)(batch), batch)

    with pytest.raises(ValueError, match=r"(?s)layer at `.pytree\[0\]`.*used transposed.*KroneckerSum"):
        update(model, loss_fn, jnp.arange(5))
    update(kfax.set_block(model, ".pytree[0]", kfax.KroneckerSum()), loss_fn, jnp.arange(5))


def test_a_tied_weight_that_is_computed_is_reported():
    """`get` may compute on arrays: then it is unknown where they come from, and the check notices."""
    pair = (eqx.nn.Linear(3, 4, key=KEYS[0]), eqx.nn.Linear(4, 3, key=KEYS[1]))
    model = kfax.tag(eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: jnp.transpose(p[0].weight)))

    def loss_fn(model, batch):
        def one(x):
            first, second = model()
            return second(jnp.tanh(first(x)))

        return kfax.squared_error(jax.vmap(one)(batch), batch)

    with pytest.raises(ValueError, match=r"layer at `.pytree\[0\]`.*behind its tag's back"):
        kfax.check(loss_fn, model, jax.random.normal(KEYS[2], (6, 3)))


# -- sizes of factors --


@grid(max_dim=[0, 4])
def test_long_sides_have_diagonal_factors(max_dim):
    block = kfax.KroneckerFactored(max_dim=max_dim)
    model = kfax.set_block(kfax.tag(mlp(KEYS[0], (6, 3, 5))), lambda m: m, block)
    x, y = jax.random.normal(KEYS[1], (7, 6)), jax.random.normal(KEYS[2], (7, 5))
    estimator, state = update(model, squared, (x, y))
    _, dense_state = update(kfax.tag(kfax.untag(model)), squared, (x, y))
    p = parameters(model)
    refreshed = estimator.refresh(state, p, 0.2)
    vector = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), p)
    dense = estimator.to_dense(state, p)
    assert_close(ravel_pytree(estimator.multiply(state, vector))[0], dense @ ravel_pytree(vector)[0])
    assert_close(jnp.sort(estimator.eigenvalues(state, p)), jnp.linalg.eigvalsh(dense), tolerance=1e-9)
    for key, factors in state.average.value.items():
        full = dense_state.average.value[key]
        for name, size in (("a", full.a.shape[0]), ("g", full.g.shape[0])):
            found, expected = getattr(factors, name), getattr(full, name)
            assert_close(found, jnp.diag(expected) if size > max_dim else expected)
        # Damping is that of the factors as they are kept.
        a, g = (jnp.diag(f) if f.ndim == 1 else f for f in (factors.a, factors.g))
        pi = jnp.sqrt((jnp.trace(a) / len(a)) / (jnp.trace(g) / len(g)))
        damped = kronecker(a + pi * jnp.sqrt(0.2) * jnp.eye(len(a)), g + jnp.sqrt(0.2) / pi * jnp.eye(len(g)))
        before, after = (
            parts(tree)[key].operation.to_matrix().reshape(-1) for tree in (vector, estimator.solve(refreshed, vector))
        )
        assert_close(damped @ after, before, tolerance=1e-9)  # the condition number of the damped block


def test_coverage_predicts_the_memory_of_every_block():
    model = {
        "embedding": eqx.nn.Embedding(50, 4, key=KEYS[0]),
        "conv": eqx.nn.Conv1d(4, 6, 3, groups=2, key=KEYS[1]),
        "norm": eqx.nn.LayerNorm(6),
        "cell": eqx.nn.LSTMCell(6, 3, key=KEYS[2]),
        "module": kfax.TaggedModule(eqx.nn.WeightNorm(eqx.nn.Linear(3, 2, key=KEYS[3])), block=kfax.Full()),
        "wide": kfax.TaggedLinear(eqx.nn.Linear(9, 4, key=KEYS[4]), block=kfax.KroneckerFactored(max_dim=5)),
    }
    model = kfax.tag(model)
    state = kfax.BlockDiagonalCurvature().init(model)
    coverage = kfax.coverage(model)
    leaves = jax.tree.leaves((state.average.value, state.inverses))
    assert sum(row.num_bytes for row in coverage.rows) == sum(leaf.nbytes for leaf in leaves)
    assert sum(row.num_parameters for row in coverage.rows) == sum(x.size for x in jax.tree.leaves(parameters(model)))
    by_path = {row.path: row for row in coverage.rows}
    assert by_path["['embedding']"].num_bytes == 8 * (2 * (50 + 4 * 4) + 1)  # not the square of the vocabulary
    assert by_path["['conv']"].num_bytes == 2 * 8 * (2 * (7 * 7 + 3 * 3) + 1)  # one for each group
    assert by_path["['wide']"].num_bytes == 8 * (2 * (10 + 4 * 4) + 1)
    assert all(row.update_flops > 0 and row.refresh_flops > 0 and row.solve_flops > 0 for row in coverage.rows)


def test_coverage_shows_what_is_tied():
    pair = (eqx.nn.Embedding(5, 3, key=KEYS[0]), eqx.nn.Linear(3, 5, key=KEYS[1]))
    model = kfax.tag([eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight)])
    embedding, bias = kfax.coverage(model).rows
    assert embedding.tied == ("[0].pytree[1]",)
    assert embedding.block == "KroneckerSum(Expand())"
    assert "tied to [0].pytree[1]" in str(kfax.coverage(model))
    assert bias.parameters == (("bias", (5,)),)


# -- frozen parts --


FREEZABLE = {
    "linear": (lambda: eqx.nn.Linear(4, 3, key=KEYS[0]), (4,)),
    "conv": (lambda: eqx.nn.Conv1d(2, 4, 2, groups=2, key=KEYS[0]), (2, 4)),
    "norm": (lambda: eqx.nn.LayerNorm(4), (4,)),
}


@grid(layer=FREEZABLE, frozen=["weight", "bias"])
def test_a_block_follows_what_is_frozen(layer, frozen):
    make, shape = FREEZABLE[layer]
    plain = eqx.nn.Sequential([make(), eqx.nn.Lambda(lambda x: jnp.tanh(x).reshape(-1))])
    model = kfax.set_block(kfax.tag(plain), lambda m: m.layers[0], kfax.Full())
    x = jax.random.normal(KEYS[1], (5, *shape))
    y = jnp.zeros_like(jax.vmap(plain)(x))
    where = lambda m: getattr(m.layers[0], frozen)  # noqa: E731
    kfax.check(squared, model, (x, y), frozen=where)
    estimator, state = update(model, squared, (x, y), frozen=where)
    kept = {"weight": "bias", "bias": "weight"}[frozen]

    def outputs(array):
        return jax.vmap(eqx.tree_at(lambda m: getattr(m.layers[0], kept), plain, array))(x)

    exact = ggn(outputs, getattr(plain.layers[0], kept), squared_loss, y)
    trained = eqx.tree_at(where, parameters(model), None)
    assert_close(estimator.to_dense(state, trained), exact)


# -- masks --


class Tokens(eqx.Module):
    """A dense layer at each position and a pooled head; padded positions take no part."""

    embedding: eqx.nn.Embedding
    dense: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(6, 4, key=keys[0])
        self.dense = eqx.nn.Linear(4, 3, key=keys[1])
        self.norm = eqx.nn.LayerNorm(3)
        self.head = eqx.nn.Linear(3, 2, key=keys[2])

    def features(self, token):
        return jnp.tanh(self.norm(self.dense(self.embedding(token))))

    def __call__(self, tokens, mask):
        features = jax.vmap(lambda t, m: kfax.masked(self, m).features(t))(tokens, mask)
        return self.head(jnp.sum(jnp.where(mask[:, None], features, 0), axis=0))


TOKENS = jax.random.randint(KEYS[3], (3, 4), 0, 6)
LENGTHS = (4, 1, 2)
MASK = jnp.arange(4)[None, :] < jnp.array(LENGTHS)[:, None]


@pytest.mark.parametrize(
    ("sharing", "axis", "weighted"), [("Expand", "batch", True), ("Reduce", "batch", True), ("Reduce", None, False)]
)
def test_masked_positions_do_not_count(sharing, axis, weighted):
    """Padded sequences have the statistics of sequences of their own lengths."""
    plain = Tokens(KEYS[4])
    model = kfax.tag(plain)
    block = kfax.KroneckerFactored(getattr(kfax, sharing)())
    model = kfax.set_block(model, lambda m: [m.embedding, m.dense, m.head], block)
    weights = jnp.array([0.5, 2.0, 0.5]) if weighted else jnp.ones(3)

    def loss_fn(model, batch):
        outputs = jax.vmap(model, axis_name="batch")(batch, MASK)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs), weights=weights if weighted else None)

    kfax.check(loss_fn, model, TOKENS, example_axis=axis)
    _, state = update(model, loss_fn, TOKENS, example_axis=axis)
    _, garbage = update(model, loss_fn, jnp.where(MASK, TOKENS, 5 - TOKENS), example_axis=axis)
    assert_close(garbage.average.value, state.average.value)

    # One sequence at a time, without padding: a mean over examples, with R the mean number of positions.
    total = None
    for tokens, length, weight in zip(TOKENS, LENGTHS, weights, strict=True):

        def single(model, batch):
            def one(sequence):
                return model.head(jnp.sum(jax.vmap(model.features)(sequence), axis=0))

            outputs = jax.vmap(one, axis_name="batch")(batch)
            return kfax.squared_error(outputs, jnp.zeros_like(outputs))

        _, alone = update(model, single, tokens[None, :length], example_axis=axis)
        scaled = jax.tree.map(lambda leaf, w=weight: w * leaf / 3, alone.average.value)
        total = scaled if total is None else jax.tree.map(jnp.add, total, scaled)
    assert_close(state.average.value, total)


def test_masked_wants_one_boolean():
    model = kfax.tag(eqx.nn.Linear(2, 2, key=KEYS[0]))
    for wrong in (jnp.ones(3), 1.0):  # also where nothing is observed
        with pytest.raises(ValueError, match="`kfax.masked` takes one boolean, got float64"):
            kfax.masked(model, wrong)

    def loss_fn(model, batch):
        outputs = jax.vmap(lambda x: kfax.masked(model, jnp.ones(3, bool))(x))(batch)
        return kfax.squared_error(outputs, batch)

    with pytest.raises(ValueError, match=r"one boolean, got bool of shape \(3,\)"):
        update(model, loss_fn, jnp.ones((4, 2)))


@pytest.mark.parametrize("run", [lambda f: f(), lambda f: eqx.filter_jit(f)()], ids=["eager", "jit"])
def test_places_are_told_apart_though_they_hold_one_array(run):
    """As a target network begins as the network itself: identity of arrays says nothing about places."""
    net = eqx.nn.MLP(3, 2, 4, 1, key=KEYS[0])
    target = lambda model: model["target"]  # noqa: E731
    model = kfax.tag({"online": net, "target": net}, frozen=target)
    parameters = run(lambda: kfax.parameters_of(model, frozen=target))
    assert jax.tree.leaves(parameters["target"]) == []
    assert len(jax.tree.leaves(parameters["online"])) == 4
    regularized = kfax.L2(0.5, lambda model: model["online"])
    everything = kfax.parameters_of(model)
    mask = run(lambda: regularized.mask(model, everything))
    assert all(jax.tree.leaves(mask["online"])) and not any(jax.tree.leaves(mask["target"]))
    layer = kfax.TaggedLinear(eqx.nn.Linear(2, 2, key=KEYS[1]))
    twice = kfax.set_block({"first": layer, "second": layer}, lambda model: model["second"], kfax.Full())
    assert [row.block for row in kfax.coverage(twice).rows] == ["KroneckerFactored(Expand())", "Full()"]


# -- any module --


class Query(eqx.Module):
    """A learned vector: called without inputs."""

    value: jax.Array

    def __call__(self):
        return self.value


def test_a_module_without_inputs():
    class Attending(eqx.Module):
        query: Any
        head: eqx.nn.Linear

        def __call__(self, x):
            return self.head(jnp.tanh(self.query() * x))

    query = kfax.TaggedModule(Query(jnp.linspace(0.5, 1.5, 3)), block=kfax.Full())
    model = kfax.tag(Attending(query, eqx.nn.Linear(3, 2, key=KEYS[0])))
    x, y = jax.random.normal(KEYS[1], (5, 3)), jax.random.normal(KEYS[2], (5, 2))

    def loss_fn(model, batch):
        # The query is under no mapped axis unless it is named.
        return kfax.squared_error(jax.vmap(model, axis_name="batch")(batch[0]), batch[1])

    kfax.check(loss_fn, model, (x, y), example_axis="batch")
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    state = eqx.filter_jit(estimator.update)(estimator.init(model), loss_fn, model, (x, y))
    jacobians = jax.vmap(lambda x: jax.jacrev(lambda q: model.head.layer(jnp.tanh(q * x)))(query.layer.value))(x)
    expected = 2 * jnp.einsum("nki,nkj->ij", jacobians, jacobians) / 5
    assert_close(estimator.to_dense(state, kfax.parameters_of(model))[:3, :3], expected)


class Quirk(eqx.Module):
    """Fits no pattern: two arrays, arguments by name, an integer input, two outputs."""

    scale: jax.Array
    table: jax.Array

    def __call__(self, x, index, *, power=2):
        return {"y": jnp.sin(self.scale * x) ** power + self.table[index], "index": index + 1}


class WithQuirk(eqx.Module):
    quirk: Quirk
    head: eqx.nn.Linear

    def __call__(self, x):
        first = self.quirk(x, 1)
        second = self.quirk(first["y"], index=first["index"], power=3)
        return self.head(second["y"])


@grid(thin=2, block=["Full", "Diagonal"], axis=[None, "batch"])
def test_any_module_by_its_gradients(block, axis):
    quirk = Quirk(jnp.linspace(0.5, 1.5, 3), jax.random.normal(KEYS[0], (4, 3)))
    plain = WithQuirk(quirk, eqx.nn.Linear(3, 2, key=KEYS[1]))
    tagged = kfax.TaggedModule(quirk, block=getattr(kfax, block)())
    model = kfax.tag(eqx.tree_at(lambda m: m.quirk, plain, tagged))
    x, y = jax.random.normal(KEYS[2], (5, 3)), jax.random.normal(KEYS[3], (5, 2))
    kfax.check(squared, model, (x, y), example_axis=axis)
    estimator, state = update(model, squared, (x, y), example_axis=axis)
    params, static = eqx.partition(plain, eqx.is_inexact_array)
    exact = ggn(lambda p: jax.vmap(eqx.combine(p, static))(x), params, squared_loss, y)
    found = estimator.to_dense(state, parameters(model))[:15, :15]
    assert_close(found, exact[:15, :15] if block == "Full" else jnp.diag(jnp.diag(exact[:15, :15])))


def test_any_module_in_a_stack_and_partly_frozen():
    def make(scale):
        return kfax.TaggedModule(Quirk(scale, jnp.ones((4, 3))), block=kfax.Full())

    stacked = eqx.filter_vmap(make)(jax.random.uniform(KEYS[0], (3, 3)) + 0.5)
    model = kfax.tag({"quirks": stacked})
    frozen = lambda m: m["quirks"].layer.table  # noqa: E731

    def run(model, x):
        arrays, static = eqx.partition(model["quirks"], eqx.is_array)
        return jax.lax.scan(lambda x, a: (eqx.combine(a, static)(x, 0)["y"], None), x, arrays)[0]

    def loss_fn(model, batch):
        outputs = jax.vmap(lambda x: run(model, x))(batch)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    x = jax.random.normal(KEYS[1], (5, 3))
    estimator, state = update(model, loss_fn, x, frozen=frozen)
    trained = eqx.tree_at(frozen, parameters(model), None)
    found = estimator.to_dense(state, trained)

    def outputs(scale):
        changed = eqx.tree_at(lambda m: m["quirks"].layer.scale, model, scale)
        return jax.vmap(lambda x: run(changed, x))(x)

    exact = ggn(outputs, stacked.layer.scale, squared_loss, jnp.zeros((5, 3)))
    assert_close(found, block_diagonal(exact, jnp.repeat(jnp.arange(3), 3)))


def test_a_tagged_module_must_be_a_module():
    for wrong in (lambda x: x, 3, eqx.nn.Identity()):
        with pytest.raises(ValueError, match="wraps a module with parameters that can be called"):
            kfax.TaggedModule(wrong, block=kfax.Full())


# -- state --


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
        preconditioner=kfax.Preconditioner(kfax.BlockDiagonalCurvature(kfax.ExactGGN())),
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


def test_softmax_of_a_tied_model_for_one_example_of_one_token():
    """With one use in each role and one example every block is exact but for what lies between the roles."""
    pair = (eqx.nn.Embedding(4, 3, key=KEYS[0]), eqx.nn.Linear(3, 4, use_bias=False, key=KEYS[1]))
    shared = eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight)
    model = kfax.set_block(kfax.tag(shared), ".pytree[0]", kfax.Full())

    def run(model, token):
        embedding, head = model()
        return head(jnp.tanh(embedding(token)))

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(lambda t: run(model, t))(batch), batch)

    tokens = jnp.array([1, 3, 0])
    estimator, state = update(model, loss_fn, tokens)
    params, static = eqx.partition(shared, eqx.is_inexact_array)
    exact = ggn(lambda p: jax.vmap(lambda t: run(eqx.combine(p, static), t))(tokens), params, softmax_loss, tokens)
    assert_close(estimator.to_dense(state, parameters(model)), exact)

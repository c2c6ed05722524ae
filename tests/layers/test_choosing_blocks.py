"""Blocks chosen by path or function, and what they become where a part is frozen."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close, mlp, parameters
from layer_updates import squared, update
from reference import ggn, softmax_loss, squared_loss

import kfax


KEYS = jax.random.split(jax.random.key(0), 8)


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

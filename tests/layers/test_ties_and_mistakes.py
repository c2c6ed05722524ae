"""Every way to tie parameters, and what is said about mistakes in tagging."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, parameters
from layer_updates import update
from reference import ggn, kronecker, squared_loss

import kfax


nn = eqx.nn
KEYS = jax.random.split(jax.random.key(4), 6)
X = jax.random.normal(KEYS[0], (5, 3))


def zeros_loss(run):
    def loss_fn(model, batch):
        outputs = jax.vmap(lambda x: run(model, x))(batch)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    return loss_fn


def squared(model, batch):
    return zeros_loss(lambda model, x: model(x))(model, batch)


# -- ties --


def linear(i):
    return nn.Linear(3, 3, key=KEYS[i])


def two(where, get):
    return nn.Shared((linear(1), linear(2)), where=where, get=get)


def run_shared(model, x):
    """All layers one after the other, those inside a nested `Shared` too."""
    for layer in model():
        x = run_shared(layer, x) if isinstance(layer, nn.Shared) else jnp.tanh(layer(x))
    return x


def mlp(i):
    return nn.MLP(3, 3, 4, 1, key=KEYS[i])


TIES = {
    "weight": (lambda: two(lambda t: t[1].weight, lambda t: t[0].weight), None),
    "weight-frozen": (lambda: two(lambda t: t[1].weight, lambda t: t[0].weight), lambda m: m.pytree[0].weight),
    "both-bias-frozen": (
        lambda: two(lambda t: (t[1].weight, t[1].bias), lambda t: (t[0].weight, t[0].bias)),
        lambda m: m.pytree[0].bias,
    ),
    "both-weight-frozen": (
        lambda: two(lambda t: (t[1].weight, t[1].bias), lambda t: (t[0].weight, t[0].bias)),
        lambda m: m.pytree[0].weight,
    ),
    "whole-layer": (lambda: two(lambda t: t[1], lambda t: t[0]), None),
    "whole-mlp": (lambda: nn.Shared((mlp(1), mlp(2)), where=lambda t: t[1], get=lambda t: t[0]), None),
    "nested": (
        lambda: nn.Shared(
            (two(lambda t: t[1].weight, lambda t: t[0].weight), linear(3)),
            where=lambda t: t[1].weight,
            get=lambda t: t[0].pytree[0].weight,
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", TIES)
def test_ties_of_every_kind(name):
    make, frozen = TIES[name]
    model = kfax.set_block(kfax.tag(make()), lambda m: m, kfax.Full())
    loss_fn = zeros_loss(run_shared)
    kfax.check(loss_fn, model, X, frozen=frozen)
    estimator, state = update(model, loss_fn, X, frozen)
    trained = parameters(model) if frozen is None else eqx.tree_at(frozen, parameters(model), None)
    rest = eqx.combine(eqx.filter(model, eqx.is_inexact_array, inverse=True), parameters(model))
    exact = ggn(
        lambda p: jax.vmap(lambda x: run_shared(eqx.combine(p, rest), x))(X), trained, squared_loss, jnp.zeros((5, 3))
    )
    found = estimator.to_dense(state, trained)
    assert_close(found, jnp.where(found != 0, exact, 0))
    assert jnp.all(jnp.diag(found) > 0)


def test_a_head_with_a_bias_may_own_the_matrix():
    head, embedding = nn.Linear(3, 5, key=KEYS[1]), nn.Embedding(5, 3, key=KEYS[2])
    shared = nn.Shared((head, embedding), where=lambda t: t[1].weight, get=lambda t: t[0].weight)
    model = kfax.tag(shared)

    def run(model, token):
        head, embedding = model()
        return head(jnp.tanh(embedding(token)))

    tokens = jnp.array([1, 4, 4, 0])
    loss_fn = zeros_loss(run)
    kfax.check(loss_fn, model, tokens)
    estimator, state = update(model, loss_fn, tokens)
    hidden = jnp.tanh(head.weight[tokens])
    rows = jnp.concatenate([hidden, jnp.ones((4, 1))], axis=1)
    a, g = rows.T @ rows / 4, 2 * jnp.eye(5)
    one_hot = jax.nn.one_hot(tokens, 5, dtype=jnp.float64)
    back = head.weight[None] * (1 - hidden**2)[:, None, :]  # (examples, outputs, embedding)
    a_reverse, g_reverse = one_hot.T @ one_hot / 4, jnp.einsum("nci,ncj->ij", back, back) * 2 / 4
    expected = kronecker(a, g) + kronecker(jnp.pad(g_reverse, [(0, 1), (0, 1)]), a_reverse)
    [(key, factors)] = state.average.value.items()
    shape = model.pytree[0].operations()[""].shape()
    assert_close(model.pytree[0].block.to_dense(shape, factors), expected)
    refreshed = estimator.refresh(state, parameters(model), 0.1)
    solved = estimator.solve(refreshed, parameters(model))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(solved))


# -- numbers of other kinds --


def test_integer_inputs_with_weights():
    x = jnp.array([[200, 3, 7], [10, 255, 1], [90, 0, 30]], jnp.uint8)
    weights = jnp.array([0.5, 1.5, 1.0])

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(model)(batch), jnp.zeros((3, 3)), weights=weights)

    for max_dim in (0, 9):
        model = kfax.set_block(kfax.tag(linear(1)), "", kfax.KroneckerFactored(max_dim=max_dim))
        _, state = update(model, loss_fn, x)
        rows = jnp.concatenate([x.astype(float), jnp.ones((3, 1))], axis=1)
        exact = jnp.einsum("ni,n,nj->ij", rows, weights, rows) / 3
        assert_close(state.average.value[""].a, exact if max_dim else jnp.diag(exact))


@pytest.mark.parametrize("block", [kfax.KroneckerFactored(max_dim=0), kfax.Full()], ids=str)
def test_half_precision_does_not_overflow(block):
    """Squares and sums of float16 numbers are those of float32."""
    model = kfax.set_block(kfax.tag(nn.Linear(3, 3, dtype=jnp.float16, key=KEYS[1])), "", block)
    x = 300 * X.astype(jnp.float16)

    def loss_fn(model, batch):
        outputs = 300 * jax.vmap(model)(batch).astype(jnp.float32)
        return kfax.squared_error(outputs, jnp.zeros_like(outputs))

    _, state = update(model, loss_fn, x)
    for leaf in jax.tree.leaves(state.average.value):
        assert leaf.dtype == jnp.float32 and jnp.all(jnp.isfinite(leaf))


def test_parameters_keep_their_dtypes():
    layer = nn.Linear(3, 3, dtype=jnp.bfloat16, key=KEYS[1])
    model = kfax.tag(eqx.tree_at(lambda m: m.bias, layer, jnp.ones(3, jnp.float32)))
    optimizer = kfax.Optimizer(squared, learning_rate=0.1, momentum=0.9, damping=1.0)
    state = optimizer.init(model, X.astype(jnp.float32))
    new = eqx.filter_jit(optimizer.step)(model, state, X.astype(jnp.float32), key=jax.random.key(0))
    assert jax.tree.map(lambda x: x.dtype, parameters(new[0])) == jax.tree.map(lambda x: x.dtype, parameters(model))
    assert jax.tree.map(lambda x: x.dtype, new[1].velocity) == jax.tree.map(lambda x: x.dtype, state.velocity)


class Logarithm(eqx.Module):
    """Undefined at zero."""

    scale: jax.Array

    def __call__(self, x):
        return self.scale * jnp.log(x)


def test_masked_positions_do_no_harm_to_a_module_undefined_at_zero():
    model = kfax.TaggedModule(Logarithm(jnp.ones(3)), block=kfax.Diagonal())
    mask = jnp.array([[True, False], [True, True], [False, True]])
    x = jnp.where(mask[..., None], jnp.arange(18.0).reshape(3, 2, 3) + 2, 1.0)

    def run(model, pair):
        x, mask = pair
        rows = jax.vmap(lambda x, m: jnp.where(m, kfax.masked(model, m)(x), 0))(x, mask)
        return jnp.sum(rows, axis=0)

    loss_fn = zeros_loss(run)
    kfax.check(loss_fn, model, (x, mask))
    _, state = update(model, loss_fn, (x, mask))
    sums = jnp.sum(jnp.where(mask[..., None], jnp.log(x), 0), axis=1)
    assert_close(state.average.value[""][0], 2 * jnp.mean(sums**2, axis=0))


def test_masks_outside_of_a_stack():
    stacked = eqx.filter_vmap(lambda key: nn.Linear(3, 3, key=key))(KEYS[:2])
    model = kfax.tag({"stack": stacked})

    def run(model, x):
        def one(mask):
            arrays, static = eqx.partition(kfax.masked(model["stack"], mask), eqx.is_array)
            out, _ = jax.lax.scan(lambda x, a: (jnp.tanh(eqx.combine(a, static)(x)), None), x, arrays)
            return jnp.where(mask, out, 0)

        return jnp.sum(jax.vmap(one)(jnp.array([True, False])), axis=0)

    kfax.check(zeros_loss(run), model, X)
    _, state = update(model, zeros_loss(run), X)
    assert_close(state.average.value["['stack']"].positions, jnp.ones(2))


# -- mistakes --


class Own(kfax.TaggedLayer):
    """A layer of one's own, with a mistake."""

    layer: nn.Linear
    block: kfax.Blocks = kfax.KroneckerFactored()
    slots: kfax.Slots = None
    mistake: str = eqx.field(static=True, default="")

    def operations(self):
        weight, bias = self.layer.weight, self.layer.bias
        return {
            "computes": lambda: {"": kfax.Dense(weight.T, bias)},
            "no dictionary": lambda: kfax.Dense(weight, bias),
            "no operation": lambda: {"": weight},
            "forgets": lambda: {"": kfax.Dense(weight)},
            "repeats": lambda: {"a": kfax.Dense(weight, bias), "b": kfax.Dense(weight)},
            "misnames": lambda: {"a": kfax.Dense(weight, bias)},
        }.get(self.mistake, lambda: {"": kfax.Dense(weight, bias)})()

    def __call__(self, x):
        if self.mistake == "a sequence at once":
            return self.observe(x @ self.layer.weight.T + self.layer.bias, x)
        out = self.layer(x)
        return out if self.mistake == "never observes" else self.observe(out, x)


MISTAKES = {
    "computes": "must pass the arrays of the layer on as they are.*inputs_first=True",
    "no dictionary": "must return a dictionary of operations",
    "no operation": "must return a dictionary of operations",
    "forgets": r"must list every array in exactly one operation.*`.layer.bias` is in none",
    "repeats": r"must list every array in exactly one operation.*`.layer.weight` is in none of them or in several",
    "misnames": r"observes an operation named '', but its operations are \['a'\]",
    "never observes": r"layer at `.*off by 100%",
    "a sequence at once": r"observed inputs of shape \[\(4, 3\)\] and outputs of shape .* in one call, of Dense",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_layer_of_ones_own(mistake):
    def attempt():
        model = kfax.tag([Own(linear(1), mistake=mistake)])
        if mistake == "a sequence at once":
            loss_fn = zeros_loss(lambda m, x: jnp.sum(m[0](jnp.stack([x] * 4)), axis=0))
        else:
            loss_fn = zeros_loss(lambda m, x: m[0](x))
        kfax.check(loss_fn, model, X)
        update(model, loss_fn, X)

    with pytest.raises(ValueError, match=re.compile(MISTAKES[mistake], re.DOTALL)):
        attempt()


def test_gradients_that_are_not_finite():
    """The loss is finite, but what is differentiated is a square root at zero."""
    network = nn.MLP(3, 3, 8, 1, activation=lambda x: jnp.sqrt(jnp.maximum(x, 0)), key=KEYS[1])
    with pytest.raises(ValueError, match=r"gradient in the parameters of `.layers\[0\]` is not: look for"):
        kfax.check(squared, kfax.tag(network), X)


def test_complex_parameters():
    with pytest.raises(ValueError, match=r"parameter at `.layer.weight` is complex"):
        kfax.tag(nn.Linear(3, 2, dtype=jnp.complex128, key=KEYS[1]))


def test_a_shared_array_without_a_block():
    class Table(eqx.Module):
        table: jax.Array

    pair = (Table(jnp.ones((3, 3))), linear(1))
    with pytest.raises(ValueError, match=r"no curvature block: `.pytree\[0\].table`"):
        kfax.tag(nn.Shared(pair, where=lambda t: t[1].weight, get=lambda t: t[0].table))


def test_set_block_is_given_a_layer():
    model = kfax.tag([linear(1)])
    with pytest.raises(ValueError, match="must be a function of the model"):
        kfax.set_block(model, model[0], kfax.Diagonal())


def test_a_module_with_a_state():
    """A state may be used once, also by a module that is called again for its gradients."""
    make = nn.make_with_state(lambda: nn.SpectralNorm(linear(1), "weight", key=KEYS[2]))
    norm, state = make()
    model = kfax.TaggedModule(norm, block=kfax.Full())
    leaves, structure = jax.tree.flatten(state)
    loss_fn = zeros_loss(lambda m, x: m(x, jax.tree.unflatten(structure, leaves))[0])
    kfax.check(loss_fn, model, X)
    _, found = update(model, loss_fn, X)
    params, static = eqx.partition(norm, eqx.is_inexact_array)
    exact = ggn(
        lambda p: jax.vmap(lambda x: eqx.combine(p, static)(x, jax.tree.unflatten(structure, leaves))[0])(X),
        params,
        squared_loss,
        jnp.zeros((5, 3)),
    )
    assert_close(found.average.value[""], exact)

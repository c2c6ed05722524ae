"""Masked positions do not count."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, parameters
from layer_updates import update
from reference import ggn, squared_loss

import kfax


KEYS = jax.random.split(jax.random.key(0), 8)


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


class Token(eqx.Module):
    """A learned vector, added at the positions that are present."""

    table: eqx.nn.Embedding

    def __call__(self, x, mask):
        def one(x, present):
            return jnp.where(present, jnp.tanh(x + kfax.masked(self.table, present)(jnp.zeros((), int))), 0)

        return jnp.sum(jax.vmap(one)(x, mask), axis=0)


@pytest.mark.parametrize("axis", ["batch", None])
def test_a_masked_layer_that_is_the_same_at_every_position(axis):
    """Its output depends on nothing: only by the mask is it one for each position."""
    plain = Token(eqx.nn.Embedding(1, 2, key=KEYS[5]))
    model = kfax.set_block(kfax.tag(plain), ".table", kfax.Full())
    x = jax.random.normal(KEYS[6], (3, 4, 2))

    def outputs(model):
        return jax.vmap(model, axis_name="batch")(x, MASK)

    def loss_fn(model, batch):
        return kfax.squared_error(outputs(model), batch)

    targets = jnp.zeros((3, 2))
    kfax.check(loss_fn, model, targets, example_axis=axis)
    estimator, state = update(model, loss_fn, targets, example_axis=axis)
    exact = ggn(outputs, plain, squared_loss, targets)
    assert_close(estimator.to_dense(state, parameters(model)), exact)


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

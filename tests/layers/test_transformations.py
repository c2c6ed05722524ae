"""What a user's code may put around layers: the statistics of every kind of block stay the same."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close, parameters

import kfax


N, T = 5, 6


class Model(eqx.Module):
    """Convolution, normalization, a dense layer at each position, a recurrence, and a head; `wrap` is around some."""

    conv: eqx.nn.Conv1d
    norm: eqx.nn.LayerNorm
    dense: eqx.nn.Linear
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear
    position: eqx.nn.Embedding

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.conv = eqx.nn.Conv1d(2, 3, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.LayerNorm(3)
        self.dense = eqx.nn.Linear(3, 4, key=keys[1])
        self.cell = eqx.nn.GRUCell(4, 3, key=keys[2])
        self.head = eqx.nn.Linear(3, 2, key=keys[3])
        self.position = eqx.nn.Embedding(T, 3, key=keys[4])

    def __call__(self, x, wrap=lambda f: f, activation=jnp.tanh):
        def features(x):
            xs = self.conv(x).T + jax.vmap(self.position)(jnp.arange(T))
            return jax.vmap(lambda x: activation(self.dense(self.norm(x))))(xs)

        def recur(h, x):
            return self.cell(x, h), None

        h, _ = jax.lax.scan(recur, jnp.zeros(3, x.dtype), wrap(features)(x))
        return wrap(self.head)(h)


MODEL = Model(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (N, 2, T))
Y = jnp.arange(N) % 2
BLOCKS = {
    "default": None,
    "reduce": kfax.KroneckerFactored(kfax.Reduce()),
}


def tagged(block):
    model = kfax.tag(MODEL)
    if BLOCKS[block] is None:
        return model
    return kfax.set_block(model, lambda m: [m.conv, m.dense, m.cell, m.head, m.position], BLOCKS[block])


def plain(model, batch):
    x, y = batch
    return kfax.softmax_cross_entropy(jax.vmap(model, axis_name="batch")(x), y)


def statistics(model, loss_fn, jit=eqx.filter_jit, example_axis="batch"):
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis=example_axis)
    return jit(lambda m, b: estimator.update(estimator.init(m), loss_fn, m, b))(model, (X, Y)).average.value


@functools.cache
def plain_statistics(block):
    return statistics(tagged(block), plain)


def with_wrap(wrap):
    def loss_fn(model, batch):
        x, y = batch
        return kfax.softmax_cross_entropy(jax.vmap(lambda x: model(x, wrap), axis_name="batch")(x), y)

    return loss_fn


def conditional(function):
    """Around a layer, with a predicate that is the same for all rows, but unknown when it is traced."""

    def run(*arguments):
        flag = jnp.sum(MODEL.head.weight) < 1e9
        return jax.lax.cond(flag, lambda *a: function(*a), lambda *a: 0 * function(*a), *arguments)

    return run


VARIANTS = {
    "nested-jit": with_wrap(eqx.filter_jit),
    "checkpoint": with_wrap(lambda f: eqx.filter_checkpoint(lambda x: f(x))),
    "cond": with_wrap(conditional),
    "loss-under-jit": lambda model, batch: eqx.filter_jit(plain)(model, batch),
    "vmap-of-jit": lambda model, batch: kfax.softmax_cross_entropy(
        jax.vmap(eqx.filter_jit(lambda x: model(x)), axis_name="batch")(batch[0]), batch[1]
    ),
}


@grid(thin=2, variant=VARIANTS, block=BLOCKS)
def test_statistics_stay_the_same(variant, block):
    assert_close(statistics(tagged(block), VARIANTS[variant]), plain_statistics(block))


@pytest.mark.parametrize("name", ["relu", "own"])
def test_activations_with_derivatives_of_their_own(name):
    @jax.custom_jvp
    def own(x):
        return x * jax.nn.sigmoid(x)

    own.defjvp(lambda p, t: (own(p[0]), jax.jvp(lambda x: x * jax.nn.sigmoid(x), p, t)[1]))
    written_out = {
        "relu": lambda x: jnp.where(x > 0, x, 0),
        "own": lambda x: x * jax.nn.sigmoid(x),
    }[name]
    custom = {"relu": jax.nn.relu, "own": own}[name]

    def loss_fn(activation):
        return lambda model, batch: kfax.softmax_cross_entropy(
            jax.vmap(lambda x: model(x, activation=activation), axis_name="batch")(batch[0]), batch[1]
        )

    model = tagged("default")
    assert_close(statistics(model, loss_fn(custom)), statistics(model, loss_fn(written_out)))


@pytest.mark.parametrize("block", ["default", pytest.param("reduce", marks=pytest.mark.slow)])
def test_a_cast_to_bfloat16(block):
    """Parameters in float32, computation in bfloat16: every block is there, in float32, within bfloat16's precision."""
    single = jax.tree.map(lambda p: p.astype(jnp.float32) if eqx.is_inexact_array(p) else p, tagged(block))

    def low(model, batch):
        model = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if eqx.is_inexact_array(p) else p, model)
        x, y = batch[0].astype(jnp.bfloat16), batch[1]
        return kfax.softmax_cross_entropy(jax.vmap(model, axis_name="batch")(x).astype(jnp.float32), y)

    def full(model, batch):
        return plain(model, (batch[0].astype(jnp.float32), batch[1]))

    found, expected = statistics(single, low), statistics(single, full)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for key in found:
        leaves = zip(jax.tree.leaves(found[key]), jax.tree.leaves(expected[key]), strict=True)
        for x, y in leaves:
            assert x.dtype == jnp.float32
            # Three digits, of which the recurrence and the sums over rows lose one.
            assert jnp.linalg.norm(x - y) <= 0.06 * jnp.linalg.norm(y), key


@pytest.mark.parametrize("block", BLOCKS)
def test_a_mixed_cond_observes_the_rows_for_which_it_is_taken(block):
    """With the axis named: the rows are those of the examples for which the branch was taken."""
    model = tagged(block)
    taken = jnp.array([True, False, True, True, False])

    def branching(model, batch):
        x, y = batch

        def one(x, flag):
            return jax.lax.cond(flag, lambda x: model.head(x), lambda x: 0.1 * x[:2], x.reshape(-1)[:3])

        return kfax.softmax_cross_entropy(jax.vmap(one, axis_name="batch")(x, taken), y)

    def choosing(model, batch):
        x, y = batch

        def one(x, flag):
            x = x.reshape(-1)[:3]
            return jnp.where(flag, kfax.masked(model.head, flag)(x), 0.1 * x[:2])

        return kfax.softmax_cross_entropy(jax.vmap(one, axis_name="batch")(x, taken), y)

    frozen = lambda m: [m.conv, m.norm, m.dense, m.cell, m.position]  # noqa: E731
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")

    def run(loss_fn):
        kfax.check(loss_fn, model, (X, Y), example_axis="batch", frozen=frozen)
        update = eqx.filter_jit(
            lambda m, b: estimator.update(estimator.init(m, frozen=frozen), loss_fn, m, b, frozen=frozen)
        )
        return update(model, (X, Y)).average.value

    assert_close(run(branching), run(choosing))
    unnamed = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    with pytest.raises(ValueError, match="is under no mapped axis.*Name the axis"):
        kfax.check(branching, model, (X, Y), frozen=frozen)
    assert unnamed.example_axis is None


def test_an_ensemble_of_models_with_every_layer():
    """Members under `filter_vmap` equal members alone, for layers of every kind."""
    members = [kfax.tag(Model(jax.random.key(i))) for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *members)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    together = eqx.filter_jit(
        eqx.filter_vmap(lambda m: estimator.update(estimator.init(m), plain, m, (X, Y)), in_axes=eqx.if_array(0))
    )(stacked)
    for i, member in enumerate(members):
        alone = statistics(member, plain)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together.average.value), alone)
        assert jax.tree.leaves(parameters(member))

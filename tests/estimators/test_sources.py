"""Every source with every loss: its products against its cotangents, and these against dense matrices."""

import itertools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import ALL_LOSSES, grid
from helpers import assert_close
from reference import gaussian_nll_fisher, output_hessians, signs

import kfax


class AllLabels(kfax.CotangentSource):
    """A source of one's own: the Fisher information of a softmax, by every label weighted with its probability."""

    def num_cotangents(self, losses):
        return losses[0].outputs.shape[-1] ** math.prod(losses[0].outputs.shape[1:-1])

    def cotangents(self, losses, index, key):
        p = [jax.nn.softmax(loss.outputs) for loss in losses]
        return tuple(jnp.sqrt(q[..., :1]) * (q - jax.nn.one_hot(index, q.shape[-1])) for q in p)


SOURCES = {
    "ggn": kfax.ExactGGN(),
    "fisher": kfax.ExactFisher(),
    "sampled": kfax.SampledFisher(3),
    "propagated": kfax.CurvaturePropagation(3),
    "propagated-fisher": kfax.CurvaturePropagation(3, source=kfax.ExactFisher()),
    "empirical": kfax.EmpiricalFisher(),
    "own": AllLabels(),
}
# Which of a loss's properties a source needs.
NEEDS = {
    "ggn": "has_ggn",
    "fisher": "has_fisher",
    "sampled": "has_samples",
    "propagated": "has_ggn",
    "propagated-fisher": "has_fisher",
}
TUPLES = {
    **{name: (name,) for name in ALL_LOSSES},
    "two natural": ("softmax", "poisson"),
    "two functions": ("function-softmax", "function-quartic"),
    "two with a Fisher": ("squared", "gaussian_nll"),
}
KEY = jax.random.key(9)


def make_losses(names, shape=(4, 2, 4)):
    """Losses with weights, masks and factors, differing in size; and what they are of one example, unweighted."""
    made = []
    for i, name in enumerate(names):
        case = ALL_LOSSES[name]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 3)
        outputs = jax.random.normal(keys[0], (*shape[: len(shape) - i], *shape[-1:]) if i else shape)
        targets = case.targets(keys[1], outputs.shape)
        weights = jnp.array([1.0, 0.5, 2.0, 1.5])
        mask = jax.random.bernoulli(keys[2], 0.7, outputs.shape[:-1]).at[1].set(False)
        made.append((1.0 + i) * case.make(outputs, targets, weights=weights, mask=mask, mean_over_positions=i == 1))
    return tuple(made)


def flat(cotangents):
    """`(n, D)`: the cotangents of one example's outputs, raveled."""
    return jnp.concatenate([x.reshape(len(x), -1) for x in cotangents], axis=1)


def split(losses, vector):
    """What `flat` flattened."""
    sizes = itertools.accumulate(math.prod(loss.outputs.shape[1:]) for loss in losses)
    parts = jnp.split(vector, list(sizes)[:-1], axis=1)
    return tuple(part.reshape(loss.outputs.shape) for part, loss in zip(parts, losses, strict=True))


def columns(source, losses, key: jax.Array | None = KEY):
    """`(n, D, K)`: all cotangents."""
    indices = jnp.arange(source.num_cotangents(losses))
    return jnp.moveaxis(jax.lax.map(lambda i: flat(source.cotangents(losses, i, key)), indices), 0, 2)


jitted_columns = eqx.filter_jit(columns)


@eqx.filter_jit
def columns_and_products(source, losses, v, u, key=KEY):
    return (
        columns(source, losses, key),
        flat(source.multiply_factor(losses, v, key)),
        source.multiply_factor_transpose(losses, split(losses, u), key),
        flat(source.multiply(losses, split(losses, u), key)),
    )


def blocks(matrix, losses):
    """An unweighted matrix of the raveled outputs of one position, `f -> (d, d)`, put together for all outputs."""
    found = []
    for loss in losses:
        each = matrix(loss)
        coefficients = loss.weighting.coefficients(loss.outputs.shape)[..., 0]
        weighted = (each * coefficients[..., None, None]).reshape(len(each), -1, *each.shape[-2:])
        found.append(jax.vmap(lambda stack: jax.scipy.linalg.block_diag(*stack))(weighted))
    return jax.vmap(jax.scipy.linalg.block_diag)(*found)


def hessians(names, losses):
    """Dense Hessians of all losses in the outputs of one example, with weights, in the tests' own formulas."""
    cases = {id(loss): ALL_LOSSES[name] for name, loss in zip(names, losses, strict=True)}

    def each(loss):
        f, y = loss.outputs, loss.data[0] if isinstance(loss, kfax.FunctionLoss) else loss.targets
        positions = f.shape[:-1]
        flat_f, flat_y = f.reshape(-1, f.shape[-1]), y.reshape(math.prod(positions), *y.shape[len(positions) :])
        return output_hessians(cases[id(loss)].one, flat_f, flat_y).reshape(*positions, f.shape[-1], f.shape[-1])

    return blocks(each, losses)


def fishers(names, losses):
    """Dense Fisher information: the Hessian, where outputs are natural parameters."""

    def each(loss):
        flat_f = loss.outputs.reshape(-1, loss.outputs.shape[-1])
        return jax.vmap(gaussian_nll_fisher)(flat_f).reshape(*loss.outputs.shape, -1)

    if "gaussian_nll" not in names:
        return hessians(names, losses)
    parts = [
        blocks(each, (loss,)) if name == "gaussian_nll" else hessians((name,), (loss,))
        for name, loss in zip(names, losses, strict=True)
    ]
    return jax.vmap(jax.scipy.linalg.block_diag)(*parts)


def is_known(source, names):
    return source not in NEEDS or all(getattr(ALL_LOSSES[name], NEEDS[source]) for name in names)


@grid(thin=3, source=SOURCES, losses=TUPLES)
def test_products_are_those_of_the_cotangents(source, losses):
    made = make_losses(TUPLES[losses])
    number = SOURCES[source].num_cotangents(made)
    v = jax.random.normal(jax.random.key(2), (4, number))
    u = jax.random.normal(jax.random.key(3), flat([loss.outputs for loss in made]).shape)
    if not is_known(source, TUPLES[losses]):
        chosen, tangents = SOURCES[source], split(made, u)
        for call in (
            lambda: columns(chosen, made),
            lambda: chosen.multiply_factor(made, v, KEY),
            lambda: chosen.multiply_factor_transpose(made, tangents, KEY),
            lambda: chosen.multiply(made, tangents, KEY),
        ):
            with pytest.raises(ValueError, match="source of curvature"):
                eqx.filter_jit(call)()
        return
    q, factor, transpose, both = columns_and_products(SOURCES[source], made, v, u)
    assert q.shape == (4, u.shape[1], number)
    assert_close(factor, jnp.einsum("ndk,nk->nd", q, v))
    assert_close(transpose, jnp.einsum("ndk,nd->nk", q, u))
    expected = jnp.einsum("ndk,nek,ne->nd", q, q, u)
    assert_close(both, expected)


def test_how_many_combinations_there_are(record_property):
    rows = list(itertools.product(SOURCES, TUPLES.values()))
    known = sum(is_known(*row) for row in rows)
    record_property("combinations", len(rows))
    record_property("refused", len(rows) - known)
    assert (len(rows), len(rows) - known) == (70, 12)


@grid(losses=[name for name in TUPLES if is_known("ggn", TUPLES[name])])
def test_exact_ggn_is_the_hessian_in_the_outputs(losses):
    made = make_losses(TUPLES[losses])
    q = jitted_columns(kfax.ExactGGN(), made)
    assert_close(jnp.einsum("ndk,nek->nde", q, q), hessians(TUPLES[losses], made))


@grid(losses=[name for name in TUPLES if is_known("fisher", TUPLES[name])])
def test_exact_fisher_is_the_fisher_information(losses):
    made = make_losses(TUPLES[losses])
    q = jitted_columns(kfax.ExactFisher(), made)
    assert_close(jnp.einsum("ndk,nek->nde", q, q), fishers(TUPLES[losses], made))


@grid(losses=TUPLES)
def test_empirical_fisher_is_the_second_moment_of_the_gradients_of_examples(losses):
    names = TUPLES[losses]
    outputs, targets, gradients = [], [], []
    for i, name in enumerate(names):
        outputs.append(jax.random.normal(jax.random.key(i), (4, 4)))
        targets.append(ALL_LOSSES[name].targets(jax.random.key(10 + i), (4, 4)))
        gradients.append(jax.vmap(jax.grad(ALL_LOSSES[name].one))(outputs[-1], targets[-1]))
    weights = jnp.array([1.0, 0.5, 2.0, 1.5])
    arrays = list(zip(names, outputs, targets, strict=True))
    made = tuple(3 * ALL_LOSSES[name].make(f, y, weights=weights) for name, f, y in arrays)
    q = jitted_columns(kfax.EmpiricalFisher(), made, None)
    g = jnp.concatenate(gradients, axis=1)
    expected = 3 * jnp.einsum("n,nd,ne->nde", weights / weights.mean(), g, g)
    assert_close(q @ jnp.swapaxes(q, 1, 2), expected)


# -- nothing left to chance: all outcomes of what is drawn, one after the other --


@grid(losses=["sigmoid", "function-quartic", "gaussian_nll", "two natural"])
def test_all_signs_of_curvature_propagation_average_to_the_matrix(losses, monkeypatch):
    names = TUPLES[losses]
    exact = kfax.ExactGGN() if is_known("ggn", names) else kfax.ExactFisher()
    source = kfax.CurvaturePropagation(source=exact)
    made = make_losses(names, (4, 4) if len(names) == 1 else (4, 1, 4))
    size = source.source.num_cotangents(made)

    def drawn(row):
        monkeypatch.setattr(jax.random, "rademacher", lambda key, shape, dtype: jnp.broadcast_to(row, shape))
        return flat(source.cotangents(made, jnp.zeros((), int), KEY))

    q = jax.jit(lambda rows: jax.lax.map(drawn, rows))(signs(size))
    expected = (hessians if is_known("ggn", names) else fishers)(names, made)
    assert_close(jnp.einsum("snd,sne->nde", q, q) / len(q), expected)


@grid(loss=["softmax", "function-softmax", "sigmoid"])
def test_all_labels_of_the_sampled_fisher_average_to_the_matrix(loss, monkeypatch):
    outputs = jax.random.normal(jax.random.key(1), (4, 4))
    case = ALL_LOSSES[loss]
    given = case.targets(jax.random.key(2), (4, 4))
    if loss == "sigmoid":
        outcomes = (signs(4) + 1) / 2
        p = jax.nn.sigmoid(outputs)
        probabilities = jnp.stack([jnp.prod(jnp.where(y == 1, p, 1 - p), axis=1) for y in outcomes])
    else:
        outcomes, probabilities = jnp.arange(4), jax.nn.softmax(outputs).T

    def drawn(y):
        monkeypatch.setattr(jax.random, "categorical", lambda key, f: jnp.broadcast_to(y, f.shape[:-1]))
        monkeypatch.setattr(jax.random, "bernoulli", lambda key, p: jnp.broadcast_to(y, p.shape))
        made = 2 * case.make(outputs, given)
        return kfax.SampledFisher().cotangents((made,), jnp.zeros((), int), KEY)[0]

    q = jax.jit(lambda rows: jax.lax.map(drawn, rows))(outcomes)
    expected = 2 * output_hessians(case.one, outputs, given)
    assert_close(jnp.einsum("sn,snd,sne->nde", probabilities, q, q), expected)


# -- and with chance --


RANDOM = ["sampled", "propagated", "propagated-fisher"]


@grid(source=RANDOM, losses=["two natural", "two functions", "two with a Fisher"])
def test_random_sources_are_unbiased(source, losses):
    names = TUPLES[losses]
    if not is_known(source, names):
        return
    made = make_losses(names, (4, 1, 4))
    number = 4000

    @jax.jit
    def draws(keys):
        return jax.lax.map(lambda key: columns(SOURCES[source], made, key), keys, batch_size=400)

    q = draws(jax.random.split(jax.random.key(5), number))
    products = jnp.einsum("sndk,snek->snde", q, q)
    expected = (fishers if source != "propagated" else hessians)(names, made)
    # Five standard errors of the mean of `number` draws, for 4 x 8 x 8 entries.
    assert jnp.all(jnp.abs(products.mean(0) - expected) <= 5 * products.std(0) / math.sqrt(number) + 1e-12)


def test_samples_of_one_key_are_different_and_repeat():
    made = make_losses(("softmax", "squared"))
    for source in (SOURCES[name] for name in RANDOM):
        q = jitted_columns(source, made)
        assert not jnp.array_equal(q[..., 0], q[..., 1])
        assert_close(jitted_columns(source, made), q)
        assert not jnp.array_equal(jitted_columns(source, made, jax.random.key(1)), q)


@grid(source=RANDOM)
def test_random_sources_need_a_key(source):
    with pytest.raises(ValueError, match=r"pass `key=jax.random.key"):
        columns(SOURCES[source], make_losses(("softmax",)), None)


@pytest.mark.parametrize("make", [kfax.SampledFisher, kfax.CurvaturePropagation])
def test_at_least_one_sample(make):
    with pytest.raises(ValueError, match="`num_samples` must be a whole number, at least 1, got 0"):
        make(0)


# -- what it costs --


@grid(source=SOURCES)
def test_the_program_does_not_grow_with_the_number_of_cotangents(source):
    def count(width):
        made = (kfax.squared_error(jnp.zeros((4, width)), jnp.zeros((4, width))),)
        chosen = SOURCES[source]
        if isinstance(chosen, kfax.SampledFisher):
            chosen = kfax.SampledFisher(width)
        if isinstance(chosen, kfax.CurvaturePropagation):
            chosen = kfax.CurvaturePropagation(width, source=chosen.source)
        v, u = jnp.zeros((4, chosen.num_cotangents(made))), jnp.zeros((4, width))
        return str(jax.make_jaxpr(lambda: columns_and_products(chosen, made, v, u))()).count(" = ")

    assert count(3) == count(30)


def test_exact_products_do_not_loop_over_cotangents():
    made = (kfax.squared_error(jnp.zeros((2, 50_000)), jnp.zeros((2, 50_000))),)
    for source in (kfax.ExactGGN(), kfax.ExactFisher()):
        text = str(jax.make_jaxpr(lambda u, source=source: source.multiply(made, (u,), None))(jnp.zeros((2, 50_000))))
        assert "scan" not in text and "while" not in text


@grid(source=SOURCES)
def test_half_precision(source):
    f = jax.random.normal(jax.random.key(0), (4, 3)).astype(jnp.bfloat16)
    made = (kfax.softmax_cross_entropy(f, jnp.zeros(4, int)), kfax.squared_error(f, f))
    chosen = SOURCES[source]
    v = jnp.ones((4, chosen.num_cotangents(made)))

    @jax.jit
    def run(made, f):
        return (
            chosen.multiply_factor(made, v, KEY),
            chosen.multiply(made, (f, f), KEY),
            () if source == "own" else chosen.cotangents(made, jnp.zeros((), int), KEY),
        ), chosen.multiply_factor_transpose(made, (f, f), KEY)

    results, transpose = run(made, f)
    assert all(result.dtype == jnp.bfloat16 for result in jax.tree.leaves(results))
    assert all(jnp.all(jnp.isfinite(result)) for result in jax.tree.leaves((results, transpose)))


def test_two_losses_are_diagonalized_one_place_at_a_time():
    """Batched calls for both at the same time could stop XLA for good on the CPU: see the design notes."""
    keys = jax.random.split(jax.random.key(0), 4)
    f, g = jax.random.normal(keys[0], (64, 12)), jax.random.normal(keys[1], (64, 12))

    def quartic(f, y):
        return jnp.sum((f - y) ** 4) + jnp.sum(f) ** 2

    made = (kfax.function_loss(quartic, f, g), kfax.function_loss(quartic, g, f))
    run = jax.jit(lambda made, u: kfax.ExactGGN().multiply_factor(made, u, None))
    u = jax.random.normal(keys[2], (64, 24))
    text = run.trace(made, u).lower(lowering_platforms=("cpu",)).as_text()
    assert "lapack" in text and set(re.findall(r"num_batch_dims = \"(\d)\"", text)) == {"0"}
    first, second = run(made, u)
    assert_close(first, made[0].ggn_factor(u[:, :12]))
    assert_close(second, made[1].ggn_factor(u[:, 12:]))

"""Layers that are used several times: statistics equal those of the unrolled computation, one use at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import grid
from helpers import assert_close
from jax.scipy.linalg import block_diag
from reference import kronecker, output_hessians, recorded, squared_loss

import kfax
from kfax._layers import parts


N = 3
KEYS = jax.random.split(jax.random.key(11), 8)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A model, as a user writes it, and the same unrolled.

    `run(model, x)` is for one example. `unrolled(call, model, x)` says which use belongs to which operation: to that
    with the key `name`, or `(name, i)` for the i-th of a stack; `name + "^T"` for a transposed use and `name + "-b"`
    for one without the bias.
    """

    model: Any
    x: jax.Array
    run: Callable
    unrolled: Callable


# -- scenarios --


def double():
    def run(model, x):
        return jnp.tanh(model(x)) + jnp.tanh(model(x[::-1]))

    def unrolled(call, model, x):
        return jnp.tanh(call("", model, x)) + jnp.tanh(call("", model, x[::-1]))

    return Scenario(eqx.nn.Linear(4, 3, key=KEYS[0]), jax.random.normal(KEYS[1], (N, 4)), run, unrolled)


def siamese():
    model = {"encoder": eqx.nn.Linear(4, 3, key=KEYS[0]), "head": eqx.nn.Linear(3, 2, key=KEYS[1])}

    def run(model, pair):
        first, second = jax.vmap(lambda x: jnp.tanh(model["encoder"](x)))(pair)
        return model["head"](jnp.abs(first - second))

    def unrolled(call, model, pair):
        first, second = (jnp.tanh(call("['encoder']", model["encoder"], x)) for x in pair)
        return call("['head']", model["head"], jnp.abs(first - second))

    return Scenario(model, jax.random.normal(KEYS[2], (N, 2, 4)), run, unrolled)


def tied(use_bias):
    embedding = eqx.nn.Embedding(5, 3, key=KEYS[0])
    head = eqx.nn.Linear(3, 5, use_bias=use_bias, key=KEYS[1])
    model = eqx.nn.Shared((embedding, head), where=lambda p: p[1].weight, get=lambda p: p[0].weight)

    def run(model, tokens):
        embedding, head = model()
        return jax.vmap(head)(jnp.cumsum(jnp.tanh(jax.vmap(embedding)(tokens)), axis=0))

    def unrolled(call, model, tokens):
        embedding, head = model()
        hidden = jnp.cumsum(jnp.stack([jnp.tanh(call(".pytree[0]", embedding, t)) for t in tokens]), axis=0)
        outputs = [call(".pytree[0]^T", lambda z: head.weight @ z, h) for h in hidden]
        if use_bias:
            outputs = [call(".pytree[1]", lambda z: z + head.bias, y) for y in outputs]
        return jnp.stack(outputs)

    return Scenario(model, jax.random.randint(KEYS[2], (N, 3), 0, 5), run, unrolled)


def tied_linears():
    """Exact case 7: one weight, two biases."""
    pair = (eqx.nn.Linear(3, 3, key=KEYS[0]), eqx.nn.Linear(3, 3, key=KEYS[1]))
    model = eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight)

    def run(model, x):
        first, second = model()
        return second(jnp.tanh(first(x)))

    def unrolled(call, model, x):
        first, second = model()
        y = call(".pytree[0]-b", lambda z: second.weight @ z, jnp.tanh(call(".pytree[0]", first, x)))
        return call(".pytree[1]", lambda z: z + second.bias, y)

    return Scenario(model, jax.random.normal(KEYS[2], (N, 3)), run, unrolled)


def gru():
    model = eqx.nn.GRUCell(2, 3, key=KEYS[0])

    def run(model, xs):
        return jax.lax.scan(lambda h, x: (model(x, h), None), jnp.zeros(3), xs)[0]

    def unrolled(call, model, xs):
        h = jnp.zeros(3)
        for x in xs:
            i = jnp.split(call("/input", lambda z: model.weight_ih @ z + model.bias, x), 3)
            r = jnp.split(call("/hidden", lambda z: model.weight_hh @ z, h), 3)
            candidate = call("/candidate", lambda z: z + model.bias_n, r[2])
            new = jnp.tanh(i[2] + jax.nn.sigmoid(i[0] + r[0]) * candidate)
            h = new + jax.nn.sigmoid(i[1] + r[1]) * (h - new)
        return h

    return Scenario(model, jax.random.normal(KEYS[2], (N, 4, 2)), run, unrolled)


def lstm():
    model = eqx.nn.LSTMCell(2, 3, key=KEYS[0])

    def run(model, xs):
        return jax.lax.scan(lambda s, x: (model(x, s), None), (jnp.zeros(3), jnp.zeros(3)), xs)[0][0]

    def unrolled(call, model, xs):
        h = c = jnp.zeros(3)
        for x in xs:
            gates = call("/input", lambda z: model.weight_ih @ z + model.bias, x)
            i, f, g, o = jnp.split(gates + call("/hidden", lambda z: model.weight_hh @ z, h), 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return h

    return Scenario(model, jax.random.normal(KEYS[2], (N, 4, 2)), run, unrolled)


class TransformerBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(4)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=k1)
        self.up = eqx.nn.Linear(4, 5, key=k2)
        self.down = eqx.nn.Linear(5, 4, key=k3)

    def __call__(self, xs):
        normalized = jax.vmap(self.norm)(xs)
        xs = xs + self.attention(normalized, normalized, normalized)
        return xs + jax.vmap(lambda x: self.down(jax.nn.gelu(self.up(x))))(xs)


def transformer(num_blocks):
    model = eqx.filter_vmap(TransformerBlock)(jax.random.split(KEYS[0], num_blocks))

    def run(model, xs):
        arrays, static = eqx.partition(model, eqx.is_array)
        return jax.lax.scan(lambda xs, a: (eqx.combine(a, static)(xs), None), xs, arrays)[0]

    def unrolled(call, model, xs):
        for i in range(num_blocks):
            block = jax.tree.map(lambda leaf, i=i: leaf[i] if eqx.is_array(leaf) else leaf, model)
            plain = (xs - xs.mean(1, keepdims=True)) / jnp.sqrt(xs.var(1, keepdims=True) + block.norm.eps)
            scaled = lambda z, norm=block.norm: norm.weight * z + norm.bias  # noqa: E731
            zs = [call((".norm", i), scaled, z) for z in plain]
            attention = block.attention
            project = lambda name, zs, i=i, a=attention: jnp.stack(  # noqa: E731
                [call((f".attention.{name}", i), getattr(a, name), z) for z in zs]
            )
            q, k, v = (project(f"{name}_proj", zs).reshape(-1, 2, 2) for name in ("query", "key", "value"))
            weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(2.0), axis=-1)
            mixed = jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(xs), 4)
            xs = xs + project("output_proj", mixed)
            hidden = [jax.nn.gelu(call((".up", i), block.up, x)) for x in xs]
            xs = xs + jnp.stack([call((".down", i), block.down, h) for h in hidden])
        return xs

    return Scenario(model, jax.random.normal(KEYS[2], (N, 2, 4)), run, unrolled)


SCENARIOS = {
    "double": double,
    "siamese": siamese,
    "tied": lambda: tied(use_bias=False),
    "tied-bias": lambda: tied(use_bias=True),
    "tied-linears": tied_linears,
    "gru": gru,
    "lstm": lstm,
    "transformer-2": lambda: transformer(2),
    "transformer-12": lambda: transformer(12),
}
BLOCKS = {
    "expand": kfax.KroneckerFactored(),
    "reduce": kfax.KroneckerFactored(kfax.Reduce()),
    "diagonal": kfax.Diagonal(),
    "unit-wise": kfax.UnitWise(),
    "full": kfax.Full(),
}


# -- what the blocks are to be, from single uses --


def explicit_uses(scenario, scale):
    """All uses by name: inputs `(n, uses, ...)` and cotangents `(n, columns, uses, ...)`."""

    @jax.jit
    def record(x):
        outputs = jax.vmap(lambda x: scenario.run(scenario.model, x))(x)
        hessians = scale * output_hessians(squared_loss, outputs, jnp.zeros_like(outputs))
        values, vectors = jnp.linalg.eigh(hessians)
        columns = jnp.swapaxes(vectors * jnp.sqrt(values)[:, None, :], 1, 2).reshape(N, -1, *outputs.shape[1:])

        def one(x, columns):
            found = recorded(lambda call, x: scenario.unrolled(call, scenario.model, x), x, columns)
            return [found[name] for name in names]

        return jax.vmap(one)(x, columns)

    names = _names(scenario, scenario.x[0])
    return dict(zip(names, record(scenario.x), strict=True))


def _names(scenario, x):
    names = []

    def call(name, function, z):
        if name not in names:
            names.append(name)
        return function(z)

    jax.eval_shape(lambda x: scenario.unrolled(call, scenario.model, x), x)
    return names


def explicit_blocks(scenario, part, index, block, uses):
    """The dense matrix of one operation (the index-th of its stack)."""
    shape = part.operation.shape()
    name = part.key if index is None else (part.key, index)
    suffixed = lambda suffix: uses.get(f"{part.key}{suffix}") if index is None else None  # noqa: E731
    direct, without_bias, reverse = uses[name], suffixed("-b"), suffixed("^T")
    if isinstance(part.operation, kfax.ScaleAndShift):
        x, g = direct
        terms = [jnp.stack([jnp.einsum("nuf,ncuf->ncf", x, g), g.sum(2)], axis=-1)]
        return _of_gradients(block, terms[0])
    rows = [_rows(shape, *direct, bias=shape.bias)]
    if without_bias is not None:
        rows.append(_rows(shape, *without_bias, bias=False))
    a = jnp.concatenate([a for a, _ in rows], axis=1)
    g = jnp.concatenate([g for _, g in rows], axis=2)
    if not isinstance(block, kfax.KroneckerFactored | kfax.KroneckerSum):
        gradients = jnp.einsum("ncug,nua->ncga", g, a)
        if reverse is not None:
            gradients = gradients + jnp.einsum("nua,ncug->ncag", *reverse)
        return _of_gradients(block, gradients)
    left, right, positions = _factors(a, g, block.sharing)
    if shape.one_hot:
        right = jnp.diag(jnp.diag(right))
    total = kronecker(right, left) / positions
    if reverse is not None:
        inputs, cotangents, positions = _factors(reverse[0], reverse[1], block.sharing)
        total = total + kronecker(jnp.diag(jnp.diag(inputs)), cotangents) / positions
    return total


def _rows(shape, x, g, *, bias):
    if shape.one_hot:
        return jax.nn.one_hot(x, shape.num_inputs, dtype=g.dtype), g
    a = x[..., : shape.num_inputs] if shape.num_inputs else x[..., :0]
    if shape.bias:
        a = jnp.concatenate([a, jnp.full((*a.shape[:2], 1), float(bias))], axis=-1)
    return a, g


def _factors(a, g, sharing):
    """G (or what stands left in the product), A, and R."""
    uses = a.shape[1]
    if isinstance(sharing, kfax.Reduce):
        a, g, uses = a.mean(1, keepdims=True), g.sum(2, keepdims=True), 1
    return jnp.einsum("ncui,ncuj->ij", g, g) / N, jnp.einsum("nui,nuj->ij", a, a) / N, uses


def _of_gradients(block, gradients):
    """`gradients`: (n, columns, d_g, d_a)."""
    flat = gradients.reshape(-1, gradients.shape[-2] * gradients.shape[-1])
    full = flat.T @ flat / N
    unit = jnp.repeat(jnp.arange(gradients.shape[-2]), gradients.shape[-1])
    kept = {
        kfax.Full: jnp.ones_like(full, bool),
        kfax.UnitWise: unit[:, None] == unit[None, :],
        kfax.Diagonal: jnp.eye(len(full), dtype=bool),
    }[type(block)]
    return jnp.where(kept, full, 0)


# -- tests --


def tag_with(scenario, block):
    model = kfax.tag(scenario.model)
    if block == "expand":
        return model  # the defaults

    def choose(part):
        if isinstance(part.operation, kfax.ScaleAndShift) and block == "reduce":
            return part.block
        if isinstance(part.block, kfax.KroneckerSum) and block == "reduce":
            return kfax.KroneckerSum(kfax.Reduce())
        return BLOCKS[block]

    for path in {part.path for part in parts(eqx.filter(model, eqx.is_inexact_array)).values()}:
        own = [p for p in parts(eqx.filter(model, eqx.is_inexact_array)).values() if p.path == path]
        model = kfax.set_block(model, path, choose(own[0]))
    return model


def statistics(scenario, model, example_axis, scale=1.0):
    def loss_fn(model, x):
        outputs = jax.vmap(lambda x: scenario.run(model, x), axis_name="batch")(x)
        return scale * kfax.squared_error(outputs, jnp.zeros_like(outputs))

    kfax.check(loss_fn, model, scenario.x)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis=example_axis)
    update = eqx.filter_jit(lambda m, x: estimator.update(estimator.init(m), loss_fn, m, x))
    return update(model, scenario.x).average.value


def cases():
    """All but the transformers, of those every third row; the rest is slow."""
    for i, name in enumerate(SCENARIOS):
        for j, block in enumerate(BLOCKS):
            slow = name == "transformer-12" or (name == "transformer-2" and block != "expand") or (i + j) % 3
            yield pytest.param(name, block, id=f"{name}-{block}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "block"), list(cases()))
def test_statistics_equal_those_of_the_unrolled_computation(name, block):
    scenario = SCENARIOS[name]()
    model = tag_with(scenario, block)
    # A loss c times as large has curvature c times as large, in every term of every block.
    scale = 7.0
    found = statistics(scenario, model, "batch", scale)
    uses = explicit_uses(scenario, scale)
    checked = set()
    for key, part in parts(eqx.filter(model, eqx.is_inexact_array)).items():
        matrices = part.block.to_dense(part.operation.shape(), found[key])
        stack = part.operation.shape().stack
        for index in np.ndindex(stack):
            i = index[0] if stack else None
            found_here = matrices[index] if matrices[index].ndim == 2 else block_diag(*matrices[index])
            assert_close(found_here, explicit_blocks(scenario, part, i, part.block, uses))
            checked.add(key)
    assert checked == {
        part if isinstance(part, str) else part[0] for part in uses if str(part)[-2:] not in ("-b", "^T")
    }


@grid(thin=2, name=["double", "tied-bias"], block=BLOCKS)
def test_the_axis_need_not_be_named(name, block):
    scenario = SCENARIOS[name]()
    model = tag_with(scenario, block)
    assert_close(statistics(scenario, model, None), statistics(scenario, model, "batch"))


@pytest.mark.parametrize("name", ["tied", "tied-bias"])
def test_the_sum_of_two_products_is_inverted(name):
    scenario = SCENARIOS[name]()
    model = tag_with(scenario, "expand")
    key = ".pytree[0]"
    part = parts(eqx.filter(model, eqx.is_inexact_array))[key]
    assert isinstance(part.block, kfax.KroneckerSum)
    direct, reverse = statistics(scenario, model, "batch")[key]
    damping = 0.3
    shape = part.operation.shape()
    inverse = part.block.refresh(shape, (direct, reverse), jnp.asarray(damping), ())
    # The second term is damped as a product of two factors; with those the inverse is exact.
    a, g = reverse.a, reverse.g / reverse.positions
    pi = jnp.sqrt((jnp.trace(a) / len(a)) / (g.sum() / len(g)))
    damped = kronecker(jnp.diag(g + jnp.sqrt(damping) / pi), a + pi * jnp.sqrt(damping) * jnp.eye(len(a)))
    matrix = kronecker(jnp.diag(direct.a), direct.g / direct.positions) + damped
    vector = jnp.cos(jnp.arange(15.0)).reshape(3, 5)
    assert_close(matrix @ inverse.solve(vector).reshape(-1), vector.reshape(-1))

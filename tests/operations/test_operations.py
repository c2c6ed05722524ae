"""What operations read of inputs and cotangents, against the layers of Equinox themselves."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid
from helpers import assert_close

import kfax


N, P = 3, 2


def patches(layer, x):
    """All patches `(groups, n, p * t, inputs)`, as the outputs of the layer with one-hot kernels."""
    groups, per_group = layer.groups, layer.in_channels // layer.groups
    size = per_group * layer.weight[0, 0].size
    kernels = jnp.tile(jnp.eye(size).reshape(size, per_group, *layer.kernel_size), (groups, *(1,) * (x.ndim - 2)))
    probe = eqx.tree_at(lambda m: (m.weight, m.bias), layer, (kernels, jnp.zeros((len(kernels), *(1,) * (x.ndim - 3)))))
    seen = jax.vmap(jax.vmap(probe))(x)  # (n, p, groups * inputs, *spatial)
    seen = seen.reshape(N, P, groups, size, -1)
    return jnp.moveaxis(seen, (2, 4), (0, 3)).reshape(groups, N, -1, size)


def convolutions():
    """Kernels, strides, paddings, dilations, groups and dimensions, each value with each value of some others."""
    for cls, dims, sizes in [(eqx.nn.Conv1d, 1, (7,)), (eqx.nn.Conv2d, 2, (5, 6)), (eqx.nn.Conv3d, 3, (4, 3, 4))]:
        kernels = [1, 2, 3] if dims < 3 else [2]
        rows = itertools.product(kernels, [1, 2], [0, 1, "SAME", "SAME_LOWER"], [1, 2], [1, 2])
        for i, (kernel, stride, padding, dilation, groups) in enumerate(rows):
            if dims == 1 or i % (3 if dims == 2 else 5) == 0:
                yield (
                    cls,
                    sizes,
                    dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups),
                )
    for mode in ("reflect", "replicate", "circular"):
        yield (
            eqx.nn.Conv2d,
            (5, 6),
            dict(kernel_size=(3, 2), stride=(2, 1), padding=((1, 2), (1, 0)), padding_mode=mode),
        )
    yield eqx.nn.Conv2d, (5, 5), dict(kernel_size=3, groups=4)  # depthwise
    yield eqx.nn.Conv2d, (5, 5), dict(kernel_size=3, padding="SAME", padding_mode="circular")


def transposed_convolutions():
    for cls, sizes in [
        (eqx.nn.ConvTranspose1d, (4,)),
        (eqx.nn.ConvTranspose2d, (4, 3)),
        (eqx.nn.ConvTranspose3d, (3, 3, 4)),
    ]:
        rows = itertools.product([1, 2, 3], [1, 2], [0, 1, "SAME", "SAME_LOWER"], [0, 1], [1, 2], [1, 2])
        for i, (kernel, stride, padding, extra, dilation, groups) in enumerate(rows):
            if extra >= stride or i % (2 * len(sizes) ** 2) != 0:
                continue
            yield (
                cls,
                sizes,
                dict(
                    kernel_size=kernel,
                    stride=stride,
                    padding=padding,
                    output_padding=extra,
                    dilation=dilation,
                    groups=groups,
                ),
            )
    for padding in ("SAME", "SAME_LOWER"):
        yield eqx.nn.ConvTranspose2d, (4, 3), dict(kernel_size=3, stride=2, padding=padding, padding_mode="circular")


def _id(row):
    cls, _, options = row
    return "-".join([cls.__name__, *(f"{name[0]}{value}" for name, value in options.items())])


def rows():
    """The whole grid; all but a twentieth of it is slow."""
    for i, row in enumerate([*convolutions(), *transposed_convolutions()]):
        is_special = "padding_mode" in row[2] or row[2].get("groups") == 4
        yield pytest.param(row, id=_id(row), marks=[] if i % (6 if is_special else 20) == 0 else [pytest.mark.slow])


@pytest.mark.parametrize("row", list(rows()))
def test_convolutions_against_patches_by_one_hot_kernels(row):
    cls, sizes, options = row
    k1, k2, k3, k4 = jax.random.split(jax.random.key(1), 4)
    layer = cls(4, 4, key=k1, **options)
    x = jax.random.normal(k2, (N, P, 4, *sizes))
    tagged = kfax.TaggedConvTranspose if isinstance(layer, eqx.nn.ConvTranspose) else kfax.TaggedConv
    shape = jax.eval_shape(jax.vmap(jax.vmap(layer)), x).shape
    if 0 in shape:
        pytest.fail("the kernel is larger than the image: nothing is tested")
    dy = jax.random.normal(k3, shape)
    weights = jax.random.uniform(k4, (N, P))
    operation = tagged(layer).operations()[""]  # pyright: ignore[reportArgumentType]
    assert isinstance(operation, kfax.Convolution)

    @jax.jit
    def read(x, dy, weights):
        moments = [
            operation.input_moment(x, w, jnp.float64, diagonal=diagonal)
            for w in (None, weights)
            for diagonal in (False, True)
        ]
        sums = [operation.input_sums(x, w, jnp.float64) for w in (None, weights)]
        flat_x, flat_dy = (array.reshape(-1, *array.shape[2:]) for array in (x, dy))
        return moments, sums, operation.gradient(flat_x, flat_dy, None), operation.cotangents(dy)

    @jax.jit
    def truth(x, dy, weights):
        rows = patches(layer, x)
        with_ones = jnp.concatenate([rows, jnp.ones((*rows.shape[:-1], 1))], axis=-1)
        with_ones = rows if layer.bias is None else with_ones
        moments, sums = [], []
        for w in (jnp.ones((N, P)), weights):
            by_row = jnp.repeat(w, rows.shape[2] // P, axis=1)
            moment = jnp.einsum("gnri,nr,gnrj->gij", with_ones, by_row, with_ones)
            moments += [moment, jnp.diagonal(moment, axis1=1, axis2=2)]
            sums.append(jnp.einsum("gnri,nr->gni", rows, by_row))

        def outputs(arrays):
            return jax.vmap(jax.vmap(eqx.tree_at(lambda m: (m.weight, m.bias), layer, arrays)))(x)

        _, pullback = jax.vjp(outputs, (layer.weight, layer.bias))
        [(weight, bias)] = pullback(dy)
        rows_of_v = (layer.groups, 4 // layer.groups)
        gradient = jnp.concatenate([weight.reshape(*rows_of_v, -1), bias.reshape(*rows_of_v, 1)], axis=-1)
        g = jnp.moveaxis(dy.reshape(N, P, *rows_of_v, -1), (2, 4), (0, 3)).reshape(layer.groups, N, -1, rows_of_v[1])
        return moments, sums, gradient, g

    found, expected = read(x, dy, weights), truth(x, dy, weights)
    if layer.groups == 1:  # then there is no axis of groups
        expected = jax.tree.map(lambda leaf: leaf[0], expected)
    assert_close(found, expected)
    t = expected[3].shape[-2] // P
    assert operation.num_positions(x) == t


@grid(weighted=[False, True])
def test_lookups_against_one_hot_vectors(weighted):
    embedding = eqx.nn.Embedding(7, 3, key=jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (N, P), 0, 7)
    weights = jax.random.uniform(jax.random.key(2), (N, P)) if weighted else None
    dy = jax.random.normal(jax.random.key(3), (N, P, 3))
    operation = kfax.TaggedEmbedding(embedding).operations()[""]
    assert isinstance(operation, kfax.Lookup)
    rows = jax.nn.one_hot(ids, 7, dtype=jnp.float64)
    w = jnp.ones((N, P)) if weights is None else weights
    moment = jnp.einsum("npi,np,npj->ij", rows, w, rows)
    assert_close(operation.input_moment(ids, weights, jnp.float64, diagonal=False), moment)
    assert_close(operation.input_moment(ids, weights, jnp.float64, diagonal=True), jnp.diagonal(moment))
    assert_close(operation.input_sums(ids, weights, jnp.float64), jnp.einsum("npi,np->ni", rows, w))
    flat = operation.gradient(ids.reshape(-1), dy.reshape(-1, 3), None)
    assert_close(flat, jnp.einsum("npg,npi->gi", dy, rows))


@grid(inputs_first=[False, True], use_bias=[False, True])
def test_dense_with_weights_stored_either_way(inputs_first, use_bias):
    weight = jax.random.normal(jax.random.key(0), (2, 4, 3))
    bias = jax.random.normal(jax.random.key(1), (2, 4))
    stored = jnp.swapaxes(weight, -1, -2) if inputs_first else weight

    def make(factor):
        return kfax.Dense(factor * stored, factor * bias if use_bias else None, inputs_first)

    operation = make(1)
    shape = operation.shape()
    assert (shape.stack, shape.d_g, shape.d_a, shape.bias) == ((2,), 4, 3 + use_bias, use_bias)
    matrix = operation.to_matrix()
    assert_close(matrix, jnp.concatenate([weight, bias[..., None]], -1) if use_bias else weight)
    assert_close(operation.from_matrix(3 * matrix), make(3))

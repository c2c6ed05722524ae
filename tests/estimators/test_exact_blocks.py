"""Where Kronecker-factored blocks are the exact ones: one datum, linear networks, shared weights, enumeration."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from block_cases import dense, estimate, exact_blocks, update
from cases import grid, LOSSES, make_case, UNSHARED
from helpers import assert_close, layer_groups, mlp, parameters
from jax.flatten_util import ravel_pytree
from reference import block_diagonal, ggn, signs

import kfax


class EmpiricalSource(kfax.CotangentSource):
    """The gradients for the given targets, as a user would add them."""

    def num_cotangents(self, losses):
        return 1

    def cotangents(self, losses, index, key):
        [loss] = losses
        gradient = jax.grad(lambda f: eqx.tree_at(lambda m: m.outputs, loss, f).value())(loss.outputs)
        return (gradient * loss.num_examples,)


class AllSigns(kfax.CotangentSource):
    """Curvature propagation with all sign vectors of the outputs, one after the other."""

    def num_cotangents(self, losses):
        return 2 ** losses[0].outputs[0].size

    def cotangents(self, losses, index, key):
        [loss] = losses
        vector = signs(loss.outputs[0].size)[index].reshape(loss.outputs.shape[1:])
        cotangent = loss.weigh(loss.ggn_factor(jnp.broadcast_to(vector, loss.outputs.shape)))
        return (cotangent / jnp.sqrt(self.num_cotangents(losses)),)


class AllLabels(kfax.CotangentSource):
    """The Fisher information with every label, weighted by its probability."""

    def num_cotangents(self, losses):
        return losses[0].outputs.shape[-1]

    def cotangents(self, losses, index, key):
        [loss] = losses
        p = jax.nn.softmax(loss.outputs)
        one_hot = jax.nn.one_hot(index, p.shape[-1])
        return (jnp.sqrt(p[..., index])[..., None] * (p - one_hot),)


# -- exact case 1: one datum --


@grid(thin=3, model=UNSHARED, loss=LOSSES, use_bias=[True, False])
def test_one_example_is_exact(model, loss, use_bias):
    case = make_case(model, loss, use_bias, num_examples=1)
    if model == "mlp-scan":  # the stacked hidden layers are several blocks at one path
        groups = _scanned_groups(case.model)
        matrix = ggn(case.outputs, parameters(case.model), case.one, case.y)
        assert_close(dense(case), block_diagonal(matrix, groups))
    else:
        assert_close(dense(case), exact_blocks(case))


@grid(loss=LOSSES)
def test_copies_of_one_example_are_exact(loss):
    case = make_case("mlp", loss, num_examples=1)
    copies = make_case("mlp", loss, num_examples=1)
    repeated = (jnp.repeat(copies.x, 4, axis=0), jnp.repeat(copies.y, 4, axis=0))
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = update(estimator, case, batch=repeated)
    assert_close(estimator.to_dense(state, parameters(case.model)), exact_blocks(case))


@grid(loss=LOSSES)
def test_empirical_fisher_of_one_example_is_exact(loss):
    case = make_case("mlp", loss, num_examples=1)
    flat, unravel = ravel_pytree(parameters(case.model))
    gradient = jax.grad(lambda v: case.one(case.outputs(unravel(v))[0], case.y[0]))(flat)
    paths = [row.path for row in kfax.coverage(case.model).rows]
    expected = block_diagonal(jnp.outer(gradient, gradient), layer_groups(case.model, paths))
    assert_close(dense(case, source=EmpiricalSource()), expected)


def _scanned_groups(model):
    """Which layer each number belongs to, where `.layers[1]` holds stacked layers."""
    groups = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters(model)):
        index = int(jax.tree_util.keystr(path)[len(".layers[")])
        stacked = 10 + jnp.repeat(jnp.arange(leaf.shape[0]), leaf[0].size)
        groups.append(stacked if index == 1 else jnp.full(leaf.size, index))
    return jnp.concatenate(groups)


# -- exact case 2: deep linear networks with squared error --


def linear_case(use_bias=True, **options):
    network = mlp(jax.random.key(3), (8, 5, 4, 3), activation=None, use_bias=use_bias)
    return make_case(network, "squared", **options)


@grid(use_bias=[True, False], num_examples=[1, 5])
def test_deep_linear_networks_are_exact(use_bias, num_examples):
    case = linear_case(use_bias, num_examples=num_examples)
    assert_close(dense(case), exact_blocks(case))


def test_deep_linear_networks_are_exact_with_weights():
    weights = jnp.array([1.0, 3.0, 0.0, 0.5])
    case = linear_case(num_examples=4, weights=weights)
    # G does not depend on the example here, so the weighted A makes the block exact.
    assert_close(dense(case), exact_blocks(case, weights))


def test_the_empirical_fisher_is_another_matrix():
    case = linear_case(num_examples=5)
    exact = exact_blocks(case)
    gap = jnp.linalg.norm(dense(case, source=EmpiricalSource()) - exact) / jnp.linalg.norm(exact)
    assert gap > 0.3


@grid(frozen=["weight", "bias", "layer"])
def test_frozen_parameters_leave_the_other_blocks_exact(frozen):
    case = linear_case(num_examples=5)

    def where(model):
        layer = model.layers[1]
        return layer if frozen == "layer" else getattr(layer, frozen)

    estimator, state = estimate(case, frozen=where)
    excluded = {id(leaf) for leaf in jax.tree.leaves(where(case.model))}
    kept = eqx.filter(case.model, jax.tree.map(lambda x: eqx.is_array(x) and id(x) not in excluded, case.model))
    rest = eqx.filter(case.model, jax.tree.map(lambda x: id(x) in excluded, case.model))
    matrix = ggn(lambda p: case.outputs(eqx.combine(p, rest)), kept, case.one, case.y)
    # With one of its two parameters frozen the middle layer is still one block.
    paths = [f".layers[{i}]" for i in range(3)]
    assert_close(estimator.to_dense(state, kept), block_diagonal(matrix, layer_groups(kept, paths)))


@pytest.mark.parametrize("source", [kfax.SampledFisher(3000), kfax.CurvaturePropagation(3000)])
def test_sampled_sources_converge(source):
    case = linear_case(num_examples=5)
    exact = exact_blocks(case)
    gap = jnp.linalg.norm(dense(case, source=source, key=jax.random.key(5)) - exact) / jnp.linalg.norm(exact)
    assert gap < 0.1  # the error of a mean of 3000 x 5 draws is a few percent


# -- exact case 8: outputs with more axes --


class Pointwise(eqx.Module):
    network: eqx.nn.Sequential

    def __call__(self, x):
        return jax.vmap(self.network)(x)


@grid(thin=2, loss=LOSSES, average=[False, True])
def test_outputs_of_more_axes_equal_the_flattened_batch(loss, average):
    n, t = 4, 3
    row = LOSSES[loss]
    model = kfax.tag(mlp(jax.random.key(3), (8, 5, 3)))
    x = jax.random.normal(jax.random.key(4), (n, t, 8))
    y = row.targets(jax.random.key(5), (n, t, 3))

    def sequences(model, batch):
        outputs = jax.vmap(jax.vmap(model))(batch[0])
        return row.make(outputs, batch[1], mean_over_positions=average)

    def flattened(model, batch):
        return row.make(jax.vmap(model)(batch[0]), batch[1])

    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = update(estimator, None, model=model, batch=(x, y), loss_fn=sequences)
    flat_batch = (x.reshape(n * t, 8), y.reshape(n * t, *y.shape[2:]))
    flat = update(estimator, None, model=model, batch=flat_batch, loss_fn=flattened)
    # Losses of the positions of one example are summed: t times the mean over positions.
    scale = 1.0 if average else float(t)
    assert_close(estimator.to_dense(state, parameters(model)), scale * estimator.to_dense(flat, parameters(model)))


# -- exact case 12: enumeration --


@grid(thin=2, loss=LOSSES, model=["mlp", "attention"])
def test_all_signs_give_the_exact_ggn(loss, model):
    case = make_case(model, loss)
    assert_close(dense(case, source=AllSigns()), dense(case))


@grid(model=["mlp", "attention"])
def test_all_labels_give_the_exact_ggn(model):
    case = make_case(model, "softmax")
    assert_close(dense(case, source=AllLabels()), dense(case))


@pytest.mark.parametrize("source", [kfax.SampledFisher(), kfax.CurvaturePropagation()], ids=["sampled", "signs"])
@grid(thin=2, loss=LOSSES)
def test_sources_are_unbiased(loss, source):
    case = make_case("mlp", loss, num_examples=2)
    exact = dense(case)
    draw = eqx.filter_jit(lambda key: dense(case, source=source, key=key))
    draws = jax.lax.map(draw, jax.random.split(jax.random.key(1), 3000), batch_size=100)
    errors = draws.std(0) / jnp.sqrt(len(draws))
    # Five standard errors for each of some thousand entries; entries that never vary must agree.
    assert jnp.all(jnp.abs(draws.mean(0) - exact) <= 5 * errors + 1e-10 * jnp.abs(exact).max())


# -- exact cases 3, 4 and 5: weight sharing in deep linear networks with squared error --


class LinearPositions(eqx.Module):
    """A deep linear network at each position; `pool` puts positions together after the layer before the head."""

    layers: list
    head: eqx.nn.Linear
    pool: Callable | None

    def __init__(self, key, pool, use_bias):
        keys = jax.random.split(key, 3)
        self.layers = [eqx.nn.Linear(4, 3, use_bias=use_bias, key=keys[0]), eqx.nn.Linear(3, 3, key=keys[1])]
        self.head = eqx.nn.Linear(3, 2, use_bias=use_bias, key=keys[2])
        self.pool = pool

    def __call__(self, x):
        xs = x.reshape(2, 4)
        for layer in self.layers:
            xs = jax.vmap(layer)(xs)
        return jax.vmap(self.head)(xs) if self.pool is None else self.head(self.pool(xs, axis=0))


def _is_exact(network, sharing):
    case = make_case(network, "squared", num_examples=5, sharing=sharing)
    found, exact = dense(case), exact_blocks(case)
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


@grid(thin=2, use_bias=[True, False])
def test_expand_is_exact_where_positions_have_losses_of_their_own(use_bias):
    network = LinearPositions(jax.random.key(0), None, use_bias)
    assert _is_exact(network, kfax.Expand()) < 1e-10
    assert _is_exact(network, kfax.Reduce()) > 0.01


@grid(thin=2, pool=["sum", "mean"], use_bias=[True, False])
def test_reduce_is_exact_where_positions_are_pooled(pool, use_bias):
    network = LinearPositions(jax.random.key(0), getattr(jnp, pool), use_bias)
    assert _is_exact(network, kfax.Reduce()) < 1e-10
    assert _is_exact(network, kfax.Expand()) > 0.01


class Convolutional(eqx.Module):
    conv: kfax.TaggedConv
    pooled: bool

    def __call__(self, x):
        y = self.conv(x.reshape(2, 4))
        return jnp.mean(y, axis=1) if self.pooled else y.T


@grid(thin=2, use_bias=[True, False], padding=[0, 1])
def test_convolutions_are_exact_in_the_linear_case(use_bias, padding):
    conv = eqx.nn.Conv1d(2, 3, 2, padding=padding, use_bias=use_bias, key=jax.random.key(0))
    for pooled, good, bad in [(False, kfax.Expand(), kfax.Reduce()), (True, kfax.Reduce(), kfax.Expand())]:
        for sharing, exact in [(good, True), (bad, False)]:
            network = kfax.TaggedConv(conv, block=kfax.KroneckerFactored(sharing))
            error = _is_exact(Convolutional(network, pooled), sharing)
            assert error < 1e-10 if exact else error > 0.01

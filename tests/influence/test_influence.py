"""Gradients of examples, scores and self-influence, against gradients of one example at a time and dense matrices."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, make_case
from helpers import assert_close, flat, mlp, parameters, random, split
from influence_cases import BLOCKS, gradients_of, is_kept, matrix, stacked, WEIGHTS
from jax.sharding import AxisType
from layer_cases import LAYERS
from reference import ggn, squared_loss

import kfax


class Layers:
    """A row of the table of layers, in the form of a case."""

    def __init__(self, name):
        self.case = LAYERS[name].build()
        self.model, self.x, self.y, self.one = self.case.model, self.case.x, self.case.y, squared_loss
        self.batch, self.loss_fn = self.case.batch, self.case.loss_fn

    def outputs(self, p):
        rest = eqx.filter(self.model, eqx.is_inexact_array, inverse=True)
        return self.case.outputs(kfax.untag(eqx.combine(p, rest)), self.x)


# -- what is finished in the backward pass --


@grid(thin=2, number=[2, 40], name=["mlp", "mlp-scan", "attention", "reused"])
def test_gradients_and_scores(number, name):
    """Of layers at one position and at several, used once and twice, stacked; of few and of many queries."""
    case = make_case(name, "softmax")
    influence, directions = kfax.Influence(case.loss_fn, BLOCKS), stacked(parameters(case.model), 1, number)
    expected = gradients_of(case)
    found = eqx.filter_jit(influence.gradients)(case.model, case.batch)
    assert_close(matrix(found), expected)
    by_layer = eqx.filter_jit(influence.scores_by_layer)(case.model, case.batch, directions)
    assert set(by_layer) == set(kfax.to_matrices(parameters(case.model)))
    assert_close(sum(by_layer.values()), matrix(directions) @ expected.T)
    first = next(iter(by_layer))
    only = kfax.from_matrices(parameters(case.model), mask_of(case.model, first))
    assert_close(by_layer[first], (matrix(directions) * flat(only)) @ expected.T)


def mask_of(model, key):
    return {k: jnp.full_like(m, k == key) for k, m in kfax.to_matrices(parameters(model)).items()}


@grid(thin=4, name=[name for name in LAYERS if name != "batch-norm"])
def test_scores_of_every_layer(name):
    case = Layers(name)
    influence, directions = kfax.Influence(case.loss_fn, BLOCKS), stacked(parameters(case.model), 1, 3)
    scores = eqx.filter_jit(influence.scores)(case.model, case.batch, directions)
    assert_close(scores, matrix(directions) @ gradients_of(case).T)


def test_scores_of_tokens_by_forward_mode():
    """As docs/curvature.md has them: of each token, and of each layer, adding up to the scores of examples."""
    model, x, y = kfax.tag(mlp(jax.random.key(0), (8, 4, 3))), random(1, 6, 5, 8), random(2, 6, 5, 3)

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(jax.vmap(model))(batch[0]), batch[1])

    def token_losses(model):
        return jax.vmap(jax.vmap(squared_loss))(jax.vmap(jax.vmap(model))(x), y)

    def along(direction):
        return eqx.filter_jvp(token_losses, (model,), (direction,))[1]

    influence, directions = kfax.Influence(loss_fn, BLOCKS), stacked(parameters(model), 1, 3)
    found = jax.lax.map(along, directions)
    assert found.shape == (3, 6, 5)
    assert_close(jnp.sum(found, axis=2), influence.scores(model, (x, y), directions))
    for key, scores in influence.scores_by_layer(model, (x, y), directions).items():
        only = kfax.from_matrices(parameters(model), mask_of(model, key))
        of_layer = jax.lax.map(along, jax.tree.map(lambda d, m: d * m, directions, only))
        assert_close(jnp.sum(of_layer, axis=2), scores)


def test_weights_masks_and_several_losses():
    """Weights as they are given, not divided by their mean; what is masked throughout has no score; no penalty."""
    case = make_case("mlp", "squared")
    mask = jnp.array([1, 1, 1, 1, 0, 1], bool)

    def loss_fn(model, batch):
        outputs = jax.vmap(model)(batch[0])
        losses = [
            kfax.squared_error(outputs, batch[1], weights=batch[2], mask=batch[3]),
            3.0 * kfax.squared_error(2.0 * outputs, batch[1], weights=batch[2], mask=batch[3]),
        ]
        return [*losses, kfax.Penalty(jnp.sum(outputs**2))]

    gradients = eqx.filter_jit(kfax.Influence(loss_fn, BLOCKS).gradients)
    found = matrix(gradients(case.model, (*case.batch, WEIGHTS, mask)))
    both = dataclasses.replace(case, one=lambda f, y: squared_loss(f, y) + 3 * squared_loss(2 * f, y))
    assert_close(found, (WEIGHTS * mask)[:, None] * gradients_of(both))
    part = jax.tree.map(lambda x: x[3:5], (*case.batch, WEIGHTS, mask))
    assert_close(matrix(gradients(case.model, part)), found[3:5])


def test_masked_positions_and_their_mean():
    """Summed over the positions that count, also where the loss is their mean."""
    layer = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    model, x, y = kfax.tag(layer), random(1, 5, 4, 3), random(2, 5, 4, 2)
    mask = jnp.arange(4) < jnp.array([[4], [1], [2], [3], [0]])

    def loss_fn(model, batch, mean=False):
        x, y, mask = batch
        call = lambda x, m: kfax.masked(model, m)(x)  # noqa: E731
        return kfax.squared_error(jax.vmap(jax.vmap(call))(x, mask), y, mask=mask, mean_over_positions=mean)

    @functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
    @jax.grad
    def expected(p, x, y, mask):
        outputs = jax.vmap(lambda x: p[0] @ x + p[1])(x)
        return jnp.sum(mask * jnp.sum((outputs - y) ** 2, axis=1))

    dense = matrix(expected((layer.weight, layer.bias), x, y, mask))
    for mean in (False, True):
        influence = kfax.Influence(functools.partial(loss_fn, mean=mean), BLOCKS)
        assert_close(matrix(eqx.filter_jit(influence.gradients)(model, (x, y, mask))), dense)
        directions = stacked(parameters(model), 3, 2)
        scores = eqx.filter_jit(influence.scores)(model, (x, y, mask), directions)
        assert_close(scores, matrix(directions) @ dense.T)


def test_frozen_parts_and_a_named_axis():
    case = make_case("mlp", "softmax")
    frozen = lambda model: [model.layers[0].weight, model.layers[2]]  # noqa: E731
    p = kfax.parameters_of(case.model, frozen=frozen)
    expected = gradients_of(case)[:, is_kept(case.model, frozen)]
    influence = kfax.Influence(case.loss_fn, BLOCKS, example_axis="batch", frozen=frozen)
    assert_close(matrix(eqx.filter_jit(influence.gradients)(case.model, case.batch)), expected)
    directions = stacked(p, 1, 2)
    scores = eqx.filter_jit(influence.scores)(case.model, case.batch, directions)
    assert_close(scores, matrix(directions) @ expected.T)


# -- with estimators --


ESTIMATORS = {
    "explicit": kfax.ExplicitExactCurvature(decay=1.0),
    "implicit": kfax.ImplicitExactCurvature(preconditioner=BLOCKS),
    "samples": kfax.SampleSpaceCurvature(),
    "K-FAC": kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0),
}


@grid(name=ESTIMATORS)
def test_scores_with_any_estimator(name):
    """The exact ones against a dense solve; K-FAC against the blocks of a network for which it is exact."""
    estimator = ESTIMATORS[name]
    if name == "K-FAC":  # one example, one layer
        case = make_case(kfax.tag(mlp(jax.random.key(0), (8, 3))), "squared", num_examples=1)
        model = kfax.set_block(case.model, lambda m: m, kfax.KroneckerFactored(inversion=kfax.Eigh()))
    else:
        case = make_case("mlp", "softmax")
        model = case.model
    p = parameters(model)
    exact, gradients = ggn(case.outputs, parameters(case.model), case.one, case.y), gradients_of(case)
    inverse = jnp.linalg.inv(exact + 0.1 * jnp.eye(len(exact)))

    @eqx.filter_jit
    def run(model, batch, queries):
        influence = kfax.Influence(case.loss_fn, estimator)
        state = estimator.update(estimator.init(model), case.loss_fn, model, batch)
        state = estimator.refresh(state, p, 0.1)
        scores = influence.scores(model, batch, influence.solve(state, queries))
        return scores, influence.self_influence(state, model, batch)

    queries = stacked(p, 1, 35)  # more than are solved for at a time
    scores, own = run(model, case.batch, queries)
    tolerance = 1e-4 if name == "implicit" else None  # as conjugate gradients are asked for
    assert_close(scores, matrix(queries) @ inverse @ gradients.T, tolerance)
    assert_close(own, jnp.einsum("ni,ij,nj->n", gradients, inverse, gradients), tolerance)


def test_an_ensemble_has_scores_of_each():
    keys, x, y = jax.random.split(jax.random.key(0), 3), random(1, 6, 8), random(2, 6, 3)
    models = eqx.filter_vmap(lambda key: kfax.tag(mlp(key, (8, 4, 3))))(keys)
    loss_fn = lambda model, batch: kfax.squared_error(jax.vmap(model)(batch[0]), batch[1])  # noqa: E731
    influence = kfax.Influence(loss_fn, BLOCKS)

    def run(model):
        return influence.scores(model, (x, y), influence.gradients(model, (x, y)))

    found = eqx.filter_jit(eqx.filter_vmap(run))(models)
    arrays, rest = eqx.partition(models, eqx.is_array)
    assert_close(found[1], run(eqx.combine(jax.tree.map(lambda leaf: leaf[1], arrays), rest)))


@grid(kind=[AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_several_devices(kind):
    case = make_case("mlp", "softmax", num_examples=8)
    influence, directions = kfax.Influence(case.loss_fn, BLOCKS), stacked(parameters(case.model), 1, 3)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    model, directions = split((case.model, directions), mesh, None)
    batch = split(case.batch, mesh, "data")
    scores = eqx.filter_jit(influence.scores)(model, batch, directions)
    assert_close(scores, matrix(directions) @ gradients_of(case).T)


# -- mistakes --


def test_directions_that_are_none():
    case = make_case("mlp", "softmax")
    influence, p = kfax.Influence(case.loss_fn, BLOCKS), parameters(case.model)
    frozen = jax.tree.map(lambda x: x[None], kfax.parameters_of(case.model, frozen=lambda m: m.layers[0]))
    for directions in (p, kfax.untag(stacked(p, 1, 2)), frozen):
        with pytest.raises(ValueError, match=r"`directions` must be a PyTree like `kfax\.parameters_of.*x\[None\]"):
            influence.scores(case.model, case.batch, directions)
    with pytest.raises(ValueError, match="`queries` must be a PyTree like"):
        influence.solve(BLOCKS.init(case.model), p)
    with pytest.raises(ValueError, match="No layer is tagged"):
        influence.gradients(kfax.untag(case.model), case.batch)

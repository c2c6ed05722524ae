"""The exact matrix from gradients of examples: against dense ones, where it can be had and where it cannot."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, make_case
from exact_cases import SOURCES, truth
from helpers import as_it_is, assert_close, flat, mlp, parameters, random
from reference import ggn, squared_loss

import kfax
from kfax._estimators import explicit_exact


# Of the same matrix by two sums in different orders.
TOLERANCE = 1e-12
MODEL = mlp(jax.random.key(3), (2, 8, 1))


def matrix_and_way(monkeypatch, model, loss_fn, batch, source=kfax.ExactGGN(), **options):
    """The matrix of a batch, and in which of the two ways it was made: at first products are made to leave NaNs."""
    estimator = kfax.ExplicitExactCurvature(source)

    def run():
        update = eqx.filter_jit(lambda m, b: estimator.update(estimator.init(m), loss_fn, m, b, **options))
        return update(model, batch).average.value

    with monkeypatch.context() as patch:
        patch.setattr(explicit_exact, "dense", lambda _, like: jnp.full((flat(like).size,) * 2, jnp.nan))
        found = run()
    return (found, "examples") if jnp.all(jnp.isfinite(found)) else (run(), "products")


def expected_of(model, outputs, targets, **options):
    """By the Jacobian of the whole batch, for squared errors."""
    p, rest = eqx.partition(kfax.untag(model), eqx.is_inexact_array)
    return ggn(lambda p: outputs(eqx.combine(p, rest)), p, squared_loss, targets, **options)


@grid(thin=2, source=["ggn", "empirical"], tagged=[True, False])
def test_plain_batches(monkeypatch, source, tagged):
    case = make_case("reused", "softmax", weights=jnp.array([1.0, 0.5, 0.0, 2.0, 1.5, 1.0]))
    model = case.model if tagged else kfax.untag(case.model)

    def loss_fn(model, batch):  # what is no example's goes as it is
        inputs, labels, weights, scale = batch
        logits = scale * jax.vmap(model)(inputs)
        return kfax.softmax_cross_entropy(logits, labels, weights=weights)

    weights = jnp.array([1.0, 0.5, 0.0, 2.0, 1.5, 1.0])
    batch = (*case.batch, weights, jnp.ones(()))
    found, way = matrix_and_way(monkeypatch, model, loss_fn, batch, SOURCES[source])
    assert way == "examples"
    assert_close(found, truth(case, source, weights), TOLERANCE)


@pytest.mark.parametrize("source", [kfax.SampledFisher(3), kfax.CurvaturePropagation(2)], ids=["sampled", "signs"])
def test_random_sources_draw_what_products_draw(monkeypatch, source):
    case, key = make_case("mlp", "softmax"), jax.random.key(7)
    found, way = matrix_and_way(monkeypatch, case.model, case.loss_fn, case.batch, source, key=key)
    assert way == "examples"
    implicit = kfax.ImplicitExactCurvature(source)
    state = implicit.update(implicit.init(case.model), case.loss_fn, case.model, case.batch, key=key)
    assert_close(found, eqx.filter_jit(implicit.to_dense)(state, parameters(case.model)), TOLERANCE)


def residuals(model, interior, boundary):
    """Of Poisson's equation: second derivatives of the model inside, its values at the boundary."""

    def u(x):
        return model(x)[0]

    inside = jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)) + jnp.sin(x[0]))(interior)
    return jnp.concatenate([inside, 3 * jax.vmap(u)(boundary)])


def physics_loss(model, batch):
    r = residuals(model, batch[0], batch[1])
    # As many points as there are, so that a loss of one point of each kind can be made.
    counts = jnp.repeat(jnp.array([1.0, 4.0]), jnp.array([len(batch[0]), len(batch[1])]), total_repeat_length=len(r))
    return kfax.squared_error(r, jnp.zeros_like(r), weights=counts)


@grid(thin=2, tagged=[True, False], boundary=[12, 50])
def test_sets_of_points_and_derivatives_of_the_model(monkeypatch, tagged, boundary):
    """Of two sizes or of one; 33 parameters, so that 50 points are taken in two parts."""
    monkeypatch.setattr(explicit_exact, "_MIN_NUMBERS", 1)
    points = random(1, 50, 2), random(2, boundary, 2)
    model = kfax.tag(MODEL) if tagged else MODEL
    found, way = matrix_and_way(monkeypatch, model, physics_loss, points)
    assert way == "examples"
    weights = jnp.concatenate([jnp.ones(50), jnp.full(boundary, 4.0)])
    expected = expected_of(model, lambda m: residuals(m, *points), jnp.zeros(50 + boundary), weights=weights)
    assert_close(found, expected, TOLERANCE)


def test_chunks_that_do_not_come_out_even(monkeypatch):
    monkeypatch.setattr(explicit_exact, "_MIN_NUMBERS", 1)
    x, y = random(1, 98, 2), random(2, 98, 1)  # 33, 33 and 32
    found, way = matrix_and_way(monkeypatch, MODEL, lambda m, b: kfax.squared_error(jax.vmap(m)(b[0]), b[1]), (x, y))
    assert way == "examples"
    assert_close(found, expected_of(MODEL, lambda m: jax.vmap(m)(x), y), TOLERANCE)


def centered(model, x):
    y = jax.vmap(model)(x)
    return y - jnp.mean(y, axis=0)


def normalized_before_zeros(model, x):
    """With a last layer of zeros the outputs of single examples are right, but not their gradients."""
    h = jax.vmap(model.layers[0])(x)
    return jax.vmap(model.layers[2])(jnp.tanh(h - jnp.mean(h, axis=0)))


def needs_all(model, x):
    return jnp.asarray([2.0, 1.0] * 3)[:, None] * jax.vmap(model)(x)


@pytest.mark.parametrize("outputs", [centered, normalized_before_zeros, needs_all], ids=lambda f: f.__name__)
def test_examples_that_are_not_apart(monkeypatch, outputs):
    model = eqx.tree_at(lambda m: m.layers[2].weight, MODEL, jnp.zeros((1, 8)))
    x, y = random(1, 6, 2), random(2, 6, 1)
    found, way = matrix_and_way(monkeypatch, model, lambda m, b: kfax.squared_error(outputs(m, b[0]), b[1]), (x, y))
    assert way == "products"
    assert_close(found, expected_of(model, lambda m: outputs(m, x), y), TOLERANCE)


def test_batches_that_are_put_together_in_another_way(monkeypatch):
    points = {"inside": random(1, 7, 2), "boundary": random(2, 5, 2)}  # a dictionary is in the order of its keys
    loss_fn = lambda m, b: physics_loss(m, (b["inside"], b["boundary"]))  # noqa: E731
    found, way = matrix_and_way(monkeypatch, MODEL, loss_fn, points)
    assert way == "products"
    weights = jnp.concatenate([jnp.ones(7), jnp.full(5, 4.0)])
    outputs = functools.partial(residuals, interior=points["inside"], boundary=points["boundary"])
    assert_close(found, expected_of(MODEL, outputs, jnp.zeros(12), weights=weights), TOLERANCE)
    x, y = random(1, 2, 6), random(2, 6, 1)
    loss_fn = lambda m, b: kfax.squared_error(jax.vmap(m, in_axes=1)(b[0]), b[1])  # noqa: E731
    found, way = matrix_and_way(monkeypatch, MODEL, loss_fn, (x, y))
    assert way == "products"
    assert_close(found, expected_of(MODEL, lambda m: jax.vmap(m, in_axes=1)(x), y), TOLERANCE)


def test_a_loss_without_a_factor(monkeypatch):
    x = random(1, 6, 2)
    loss_fn = lambda m, b: kfax.function_loss(lambda f: jnp.sum(f**2), jax.vmap(m)(b), max_dim=0)  # noqa: E731
    found, way = matrix_and_way(monkeypatch, MODEL, loss_fn, x)
    assert way == "products"
    assert_close(found, expected_of(MODEL, lambda m: jax.vmap(m)(x), jnp.zeros((6, 1))), TOLERANCE)


def test_an_ensemble():
    models = eqx.filter_vmap(lambda key: mlp(key, (2, 4, 1)))(jax.random.split(jax.random.key(0), 3))
    x, y = random(1, 6, 2), random(2, 6, 1)
    estimator = kfax.ExplicitExactCurvature()

    @eqx.filter_jit
    @eqx.filter_vmap
    def matrices(model):
        loss_fn = lambda m, b: kfax.squared_error(jax.vmap(m)(b[0]), b[1])  # noqa: E731
        return estimator.update(estimator.init(model), loss_fn, model, (x, y)).average.value

    arrays, rest = eqx.partition(models, eqx.is_array)
    one = eqx.combine(jax.tree.map(lambda leaf: leaf[1], arrays), rest)
    assert_close(matrices(models)[1], expected_of(one, lambda m: jax.vmap(m)(x), y), TOLERANCE)


# -- the optimizer --


@grid(estimator=["explicit", "implicit"])
def test_the_optimizer_takes_untagged_models_for_exact_estimators(estimator):
    made = {"explicit": kfax.ExplicitExactCurvature(), "implicit": kfax.ImplicitExactCurvature()}[estimator]
    x, y = random(1, 6, 2), random(2, 6, 1)
    loss_fn = lambda m, b: kfax.squared_error(jax.vmap(m)(b[0]), b[1])  # noqa: E731
    settings = {"learning_rate": as_it_is(1.0), "momentum": 0.0, "damping": 0.1, "l2": 0.01}
    optimizer = kfax.Optimizer(loss_fn, **settings, preconditioner=kfax.Preconditioner(made))
    state = optimizer.init(MODEL, (x, y))
    new, _, info = eqx.filter_jit(optimizer.step)(MODEL, state, (x, y))
    p = flat(parameters(MODEL))
    gradient = flat(parameters(eqx.filter_grad(lambda m: loss_fn(m, (x, y)).value())(MODEL))) + 0.01 * p
    matrix = expected_of(MODEL, lambda m: jax.vmap(m)(x), y) + 0.11 * jnp.eye(p.size)
    # Conjugate gradients stop at 1e-5.
    step = -jnp.linalg.solve(matrix, gradient)
    assert_close(flat(parameters(new)) - p, step, 1e-12 if estimator == "explicit" else 1e-4)
    assert info.result == kfax.StepResult.successful
    wider = mlp(jax.random.key(3), (2, 9, 1))
    with pytest.raises(ValueError, match="made for a model of another structure"):
        optimizer.step(wider, state, (x, y))


def test_other_estimators_still_say_what_has_no_block():
    loss_fn = lambda m, b: kfax.squared_error(jax.vmap(m)(b), b[:, :1])  # noqa: E731
    optimizer = kfax.stochastic(loss_fn, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"No layer is tagged.*`\.layers\[0\]\.weight`"):
        optimizer.init(MODEL, random(1, 6, 2))
    with pytest.raises(ValueError, match=r"No layer is tagged.*`\.layers\[0\]\.weight`"):
        eqx.filter_jit(optimizer.init)(MODEL, random(1, 6, 2))


def test_an_untagged_model_is_checked_too():
    optimizer = kfax.Optimizer(
        lambda m, b: kfax.squared_error(jnp.sqrt(jnp.abs(jax.vmap(m)(b))), jnp.ones((6, 1))),
        learning_rate=1.0,
        momentum=0.0,
        damping=0.1,
        preconditioner=kfax.Preconditioner(kfax.ExplicitExactCurvature()),
    )
    zeros = jax.tree.map(lambda leaf: 0 * leaf if eqx.is_array(leaf) else leaf, MODEL)
    with pytest.raises(ValueError, match=r"gradient in the parameters of .*`\.layers\[2\]\.bias`.* is not"):
        optimizer.init(zeros, random(1, 6, 2))
    with pytest.raises(ValueError, match="is complex"):
        optimizer.init(jax.tree.map(lambda x: x + 0j if eqx.is_array(x) else x, MODEL), random(1, 6, 2))
    with pytest.raises(ValueError, match="no parameter to train"):
        optimizer.init(jnp.tanh, random(1, 6, 2))

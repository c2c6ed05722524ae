"""Posteriors against Bayesian linear regression in closed form, and against dense matrices."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, flat, mlp, parameters, random
from jax.flatten_util import ravel_pytree
from reference import block_diagonal, ggn, jacobians, softmax_loss

import kfax
from kfax._math import linalg


EXACT = kfax.ExplicitExactCurvature(kfax.ExactGGN(), decay=1.0)
BLOCKS = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)
POINTS = random(7, 5, 3)


def decompose(estimator, loss_fn, model, batch, frozen=None):
    state = estimator.init(model, frozen=frozen)
    state = eqx.filter_jit(lambda *args: estimator.update(*args, frozen=frozen))(state, loss_fn, model, batch)
    return eqx.filter_jit(lambda *args: estimator.decompose(*args))(state, kfax.parameters_of(model, frozen=frozen))


def predictions(laplace, points=POINTS):
    return eqx.filter_jit(jax.vmap(lambda x: laplace.predict(lambda model: model(x))))(points)


# -- linear regression --


def regression_loss(model, batch):
    return kfax.squared_error(jax.vmap(model)(batch[0]), batch[1])


@functools.cache
def regression(variance, precision, block=None):
    """A linear model of two outputs, where the posterior has its maximum; features and targets."""
    x, y = random(1, 20, 3), random(2, 20, 2)
    features = np.concatenate([x, np.ones((20, 1))], axis=1)
    inverse = features.T @ features / variance + precision * np.eye(4)
    weights = np.linalg.solve(inverse, features.T @ np.asarray(y) / variance).T
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    linear = eqx.tree_at(lambda m: (m.weight, m.bias), linear, (jnp.array(weights[:, :3]), jnp.array(weights[:, 3])))
    return kfax.tag(linear, block=block or kfax.KroneckerFactored()), (x, y), features, inverse


def log_evidence(features, y, variance, precision):
    """The density of the targets, with the weights integrated out."""
    covariance = variance * np.eye(len(features)) + features @ features.T / precision
    solved = np.linalg.solve(covariance, y)
    return -(np.sum(y * solved) + y.shape[1] * np.linalg.slogdet(2 * np.pi * covariance)[1]) / 2


def log_likelihood(model, batch, variance):
    return -20 * (regression_loss(model, batch).value() / (2 * variance) + 2 / 2 * jnp.log(2 * jnp.pi * variance))


@pytest.mark.parametrize("estimator", [EXACT, BLOCKS], ids=["exact", "blocks"])
@pytest.mark.parametrize(("variance", "precision"), [(0.5, 1.0), (0.03, 7.0)])
def test_a_linear_model_is_bayesian_linear_regression(variance, precision, estimator):
    model, batch, features, inverse = regression(variance, precision)
    spectrum = decompose(estimator, regression_loss, model, batch)
    laplace = kfax.Laplace(model, spectrum, 20, precision, temperature=2 * variance)
    found = laplace.log_evidence(log_likelihood(model, batch, variance))
    assert_close(found, log_evidence(features, np.asarray(batch[1]), variance, precision))
    predictive = predictions(laplace)
    points = np.concatenate([POINTS, np.ones((5, 1))], axis=1)
    expected = np.einsum("ni,ij,nj->n", points, np.linalg.inv(inverse), points)
    assert_close(predictive.mean, jax.vmap(model)(POINTS))
    assert_close(predictive.covariance, expected[:, None, None] * np.eye(2))


def test_away_from_the_maximum_the_evidence_is_too_small_by_what_is_documented():
    variance, precision, other = 0.1, 1.0, 200.0
    model, batch, features, _ = regression(variance, precision)
    laplace = kfax.Laplace(model, decompose(EXACT, regression_loss, model, batch), 20, other, temperature=2 * variance)
    weights = np.concatenate([model.weight, model.bias[:, None]], axis=1)
    residuals = features @ weights.T - np.asarray(batch[1])
    gradient = features.T @ residuals / variance + other * weights.T
    covariance = np.linalg.inv(features.T @ features / variance + other * np.eye(4))
    missing = np.sum(gradient * (covariance @ gradient)) / 2
    assert missing > 1
    found = laplace.log_evidence(log_likelihood(model, batch, variance))
    assert_close(found + missing, log_evidence(features, np.asarray(batch[1]), variance, other))


# -- a classifier --

PRECISION, NUMBER = 0.3, 12


def classifier_loss(model, batch):
    return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])


@functools.cache
def classifier(block):
    """Model, batch, and the dense GGN."""
    model = kfax.tag(mlp(jax.random.key(0), (3, 4, 3)), block=block)
    x, y = random(1, NUMBER, 3), jnp.arange(NUMBER) % 3
    p = parameters(kfax.untag(model))
    return model, (x, y), np.asarray(ggn(functools.partial(outputs_of, model, x), p, softmax_loss, y))


def outputs_of(model, x, p):
    return jax.vmap(eqx.combine(p, kfax.untag(model)))(x)


def kronecker_factored(model, x):
    """`kron(G, A)` of both layers, in the order of the raveled parameters."""
    first, _, last = kfax.untag(model).layers
    h = jnp.tanh(x @ first.weight.T + first.bias)
    probabilities = jax.nn.softmax(h @ last.weight.T + last.bias)
    hessians = jax.vmap(jnp.diag)(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
    slopes = (1 - h**2)[:, None, :] * last.weight  # of the outputs in what the first layer returns
    curvatures = [jnp.mean(jnp.einsum("nci,ncd,ndj->nij", slopes, hessians, slopes), 0), jnp.mean(hessians, 0)]
    blocks = []
    for a, g in zip((x, h), curvatures, strict=True):
        a = jnp.concatenate([a, jnp.ones((len(a), 1))], axis=1)
        numbers = np.arange(len(g) * a.shape[1]).reshape(len(g), a.shape[1])
        order = np.concatenate([numbers[:, :-1].reshape(-1), numbers[:, -1]])
        blocks.append(np.kron(g, a.T @ a / len(a))[np.ix_(order, order)])
    zeros = np.zeros((len(blocks[0]), len(blocks[1])))
    return np.block([[blocks[0], zeros], [zeros.T, blocks[1]]])


def by_layer(model, matrix):
    sizes = [leaf.size for leaf in jax.tree.leaves(parameters(model))]
    return np.asarray(block_diagonal(matrix, np.repeat([0, 1], [sizes[0] + sizes[1], sizes[2] + sizes[3]])))


CASES = {
    "exact": (EXACT, kfax.KroneckerFactored(), lambda model, x, matrix: matrix),
    "full": (BLOCKS, kfax.Full(), lambda model, x, matrix: by_layer(model, matrix)),
    "diagonal": (BLOCKS, kfax.Diagonal(), lambda model, x, matrix: np.diag(np.diag(matrix))),
    "K-FAC": (BLOCKS, kfax.KroneckerFactored(), lambda model, x, matrix: kronecker_factored(model, x)),
}


def dense_results(model, matrix, precision, temperature, likelihood, kept=slice(None)):
    """Evidence, and the covariance of the outputs at some points, all with matrices."""
    inverse = NUMBER / temperature * matrix + precision * np.eye(len(matrix))
    p = parameters(kfax.untag(model))
    j = np.asarray(jacobians(functools.partial(outputs_of, model, POINTS), p))[..., kept]
    covariance = np.einsum("nci,ij,ndj->ncd", j, np.linalg.inv(inverse), j)
    weights = np.asarray(flat(p))[kept]
    determinants = np.linalg.slogdet(inverse)[1] - len(matrix) * np.log(precision)
    return likelihood - precision * weights @ weights / 2 - determinants / 2, covariance


@pytest.mark.parametrize("name", CASES)
def test_a_classifier(name):
    (estimator, block, expected_curvature), temperature = CASES[name], 0.2
    model, batch, matrix = classifier(block)
    laplace = kfax.Laplace(
        model, decompose(estimator, classifier_loss, model, batch), NUMBER, PRECISION, temperature=temperature
    )
    matrix = expected_curvature(model, batch[0], matrix)
    evidence, covariance = dense_results(model, matrix, PRECISION, temperature, -7.0)
    assert_close(laplace.log_evidence(-7.0), evidence)
    predictive = predictions(laplace)
    assert_close(predictive.mean, jax.vmap(model)(POINTS))
    assert_close(predictive.covariance, covariance)


@pytest.mark.parametrize("name", ["exact", "full"])
def test_the_last_layer_alone(name):
    estimator, block, _ = CASES[name]
    model, batch, matrix = classifier(block)
    frozen = lambda model: model.layers[0]  # noqa: E731
    laplace = kfax.Laplace(
        model, decompose(estimator, classifier_loss, model, batch, frozen), NUMBER, PRECISION, frozen=frozen
    )
    kept = slice(16, 31)  # 4 x 3 + 4 are of the first layer
    evidence, covariance = dense_results(model, matrix[kept, kept], PRECISION, 1.0, -7.0, kept)
    assert_close(laplace.log_evidence(-7.0), evidence)
    assert_close(predictions(laplace).covariance, covariance)
    drawn = laplace.sample(jax.random.key(0))
    assert_close(drawn.layers[0], model.layers[0])
    assert not jnp.allclose(drawn.layers[2].weight, model.layers[2].weight)


@functools.cache
def exact_posterior():
    model, batch, matrix = classifier(kfax.KroneckerFactored())
    return model, kfax.Laplace(model, decompose(EXACT, classifier_loss, model, batch), NUMBER, PRECISION), matrix


def test_one_decomposition_for_many_precisions(monkeypatch):
    calls, eigh = [], linalg.eigh
    monkeypatch.setattr(linalg, "eigh", lambda matrix: (calls.append(matrix.shape), eigh(matrix))[1])
    model, batch, matrix = classifier(kfax.KroneckerFactored())
    spectrum = decompose(EXACT, classifier_loss, model, batch)
    precisions = jnp.logspace(-3, 3, 50)
    evidence = jax.vmap(lambda p: kfax.Laplace(model, spectrum, NUMBER, p).log_evidence(-7.0))
    found = jax.jit(evidence)(precisions)
    assert calls == [(31, 31)] and "eigh" not in str(jax.make_jaxpr(evidence)(precisions))
    assert_close(found, np.array([dense_results(model, matrix, float(p), 1.0, -7.0)[0] for p in precisions]))
    assert 0 < jnp.argmax(found) < 49
    slope = jax.grad(lambda p: evidence(p[None])[0])(jnp.array(0.3))
    assert_close(slope, (evidence(jnp.array([0.3001])) - evidence(jnp.array([0.2999])))[0] / 2e-4, 1e-6)


def test_outputs_of_any_shape_and_their_joint_distribution():
    model, laplace, matrix = exact_posterior()
    j = np.asarray(jacobians(functools.partial(outputs_of, model, POINTS), parameters(kfax.untag(model))))
    covariance = np.linalg.inv(NUMBER * matrix + PRECISION * np.eye(len(matrix)))
    joint = laplace.predict(lambda model: jax.vmap(model)(POINTS))
    assert_close(joint.covariance, np.einsum("nci,ij,mdj->ncmd", j, covariance, j))
    assert_close(joint.variance(), np.einsum("nci,ij,ncj->nc", j, covariance, j))
    one = laplace.predict(lambda model: model(POINTS[0])[1])
    assert_close((one.covariance, one.variance()), (joint.covariance[0, 1, 0, 1],) * 2)
    assert_close(one.moderated_logits(), one.mean / jnp.sqrt(1 + jnp.pi * one.variance() / 8))
    untagged = kfax.untag(model)
    spectrum = decompose(EXACT, classifier_loss, untagged, classifier(kfax.KroneckerFactored())[1])
    without_tags = kfax.Laplace(untagged, spectrum, NUMBER, PRECISION)
    assert_close(without_tags.predict(lambda model: jax.vmap(model)(POINTS)).covariance, joint.covariance)


def test_draws():
    """Means and covariances of many; the error of a covariance of n draws is about 1/√n."""
    model, laplace, matrix = exact_posterior()
    keys = jax.random.split(jax.random.key(3), 20_000)
    drawn = eqx.filter_jit(eqx.filter_vmap(lambda key: ravel_pytree(parameters(laplace.sample(key)))[0]))(keys)
    covariance = np.linalg.inv(NUMBER * matrix + PRECISION * np.eye(len(matrix)))
    assert_drawn_from(drawn, flat(parameters(model)), covariance)
    predictive = laplace.predict(lambda model: jax.vmap(model)(POINTS[:2]))
    outputs = jax.vmap(predictive.sample)(keys).reshape(len(keys), -1)
    assert_drawn_from(outputs, predictive.mean.reshape(-1), np.asarray(predictive.covariance).reshape(6, 6))


def assert_drawn_from(drawn, mean, covariance):
    errors = (jnp.mean(drawn, 0) - mean) / np.sqrt(np.diag(covariance) / len(drawn))
    assert jnp.max(jnp.abs(errors)) < 4
    assert_close(np.cov(drawn.T), covariance, 0.05)


def test_draws_of_outputs_that_are_certain_of_each_other():
    """A singular covariance."""
    covariance = jnp.outer(jnp.array([1.0, 2.0, 0.0]), jnp.array([1.0, 2.0, 0.0]))
    drawn = kfax.Predictive(jnp.zeros(3), covariance).sample(jax.random.key(0))
    assert_close(drawn[1:], jnp.array([2.0, 0.0]) * drawn[0])


def test_a_model_in_half_precision():
    model = kfax.tag(mlp(jax.random.key(0), (3, 4, 3), dtype=jnp.bfloat16))
    batch = random(1, NUMBER, 3).astype(jnp.bfloat16), jnp.arange(NUMBER) % 3
    laplace = kfax.Laplace(model, decompose(BLOCKS, classifier_loss, model, batch), NUMBER, 1.0)
    drawn = laplace.sample(jax.random.key(0))
    assert drawn.layers[0].weight.dtype == jnp.bfloat16
    predictive = laplace.predict(lambda model: model(batch[0][0]))
    assert predictive.covariance.dtype == jnp.float32 and jnp.all(predictive.variance() > 0)


# -- what it objects to --


def test_errors():
    model, laplace, _ = exact_posterior()
    for name, numbers in {"num_examples": (0, 1, 1), "prior_precision": (12, 0, 1), "temperature": (12, 1, 0)}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be positive and finite, got 0"):
            kfax.Laplace(model, laplace.spectrum, *numbers[:2], temperature=numbers[2])
    with pytest.raises(ValueError, match=r"`prior_precision`.*shape \(2,\).*map over them"):
        kfax.Laplace(model, laplace.spectrum, 12, jnp.ones(2))
    with pytest.raises(ValueError, match="`spectrum` is not that of the parameters of `model`.*`frozen`"):
        kfax.Laplace(model, laplace.spectrum, 12, 1.0, frozen=lambda model: model.layers[0])
    with pytest.raises(ValueError, match="`function` must return an array of real .* returned SoftmaxCrossEntropy"):
        laplace.predict(lambda model: classifier_loss(model, (POINTS, jnp.zeros(5, int))))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"of several examples. Map over them, as in `jax\.vmap"):
        predictions(laplace).moderated_logits()

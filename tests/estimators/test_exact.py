"""The matrices of the exact estimators, explicit and implicit, against dense ones from jacobians and Hessians."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid, LOSSES, make_case, MODELS
from exact_cases import like, SOURCES, truth, updated
from helpers import assert_close, flat, layer_groups, mlp, parameters
from jax.flatten_util import ravel_pytree
from reference import block_diagonal, ggn, jacobians, softmax_loss

import kfax


# -- the matrix --


# `test_combinations` has every loss with every matrix; here it is the models that differ.
@grid(
    thin=3,
    slow=lambda model, loss, source: loss != "softmax" or source == "fisher",
    model=MODELS,
    loss=LOSSES,
    source=SOURCES,
)
def test_implicit_is_explicit_is_dense(model, loss, source):
    case = make_case(model, loss)
    expected = truth(case, source)
    explicit, implicit = kfax.ExplicitExactCurvature(SOURCES[source]), kfax.ImplicitExactCurvature(SOURCES[source])
    dense_state, state = updated(explicit, case), updated(implicit, case)
    p, v, w = parameters(case.model), like(case, 1), like(case, 2)
    assert_close(explicit.to_dense(dense_state, p), expected)
    assert_close(eqx.filter_jit(implicit.to_dense)(state, p), expected)
    both: list[tuple[Any, Any]] = [(explicit, dense_state), (implicit, state)]
    for estimator, its_state in both:
        assert_close(flat(eqx.filter_jit(estimator.multiply)(its_state, v)), expected @ flat(v))
        operator = estimator.as_operator(its_state, p, 0.3)
        assert_close(flat(operator.mv(v)), expected @ flat(v) + 0.3 * flat(v))
    pair = jnp.stack([flat(v), flat(w)])
    assert_close(eqx.filter_jit(implicit.gram)(state, [v, w]), pair @ expected @ pair.T)


@grid(thin=2, loss=LOSSES, source=["ggn", "fisher", "empirical"])
def test_factor_products(loss, source):
    case = make_case("mlp", loss)
    estimator = kfax.ImplicitExactCurvature(SOURCES[source])
    state, v = updated(estimator, case), like(case, 1)
    back = eqx.filter_jit(estimator.multiply_factor_transpose)(state, v)
    assert back.shape == (6, 1 if source == "empirical" else 3)
    w = jax.random.normal(jax.random.key(3), back.shape)
    there = eqx.filter_jit(estimator.multiply_factor)(state, w)
    assert_close(jnp.vdot(flat(there), flat(v)), jnp.vdot(w, back))
    assert_close(flat(estimator.multiply_factor(state, back)), truth(case, source) @ flat(v))


def test_jacobian_products():
    case = make_case("mlp", "softmax")
    estimator = kfax.ImplicitExactCurvature()
    state, v = updated(estimator, case), like(case, 1)
    jacobian = jacobians(case.outputs, parameters(case.model))
    [push] = estimator.multiply_jacobian(state, v)
    assert_close(push, jacobian @ flat(v))
    u = jax.random.normal(jax.random.key(4), push.shape)
    pull = estimator.multiply_jacobian_transpose(state, (u,))
    assert_close(flat(pull), jnp.einsum("ncp,nc->p", jacobian, u))


@grid(loss=["softmax"], source=["ggn", "empirical"], masked=[False, True])
def test_weights_and_masks(loss, source, masked):
    weights = jnp.array([1.0, 0.5, 0.0, 2.0, 1.5, 1.0])
    mask = jnp.array([True, False, True, True, True, False])
    options: dict[str, Any] = {"mask": mask} if masked else {}
    case = make_case("mlp", loss, weights=weights, **options)
    expected = truth(case, source, jnp.where(mask, weights, 0) if masked else weights)
    estimator = kfax.ExplicitExactCurvature(SOURCES[source])
    assert_close(estimator.to_dense(updated(estimator, case), parameters(case.model)), expected)


@grid(loss=LOSSES)
def test_full_blocks_are_the_diagonal_blocks_of_the_exact_matrix(loss):
    case = make_case("mlp", loss)
    registry = kfax.default_registry.register(eqx.nn.Linear, lambda m: kfax.TaggedLinear(m, block=kfax.Full()))
    model = kfax.tag(kfax.untag(case.model), registry=registry)
    blocks = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = eqx.filter_jit(lambda m: blocks.update(blocks.init(m), case.loss_fn, m, case.batch))(model)
    explicit = kfax.ExplicitExactCurvature()
    exact = explicit.to_dense(updated(explicit, case), parameters(case.model))
    groups = layer_groups(model, [row.path for row in kfax.coverage(model).rows])
    assert_close(blocks.to_dense(state, parameters(model)), block_diagonal(exact, groups))


@pytest.mark.parametrize("source", [kfax.SampledFisher(3), kfax.CurvaturePropagation(2)], ids=["sampled", "signs"])
def test_sampled_matrices_are_those_of_the_key(source):
    """The implicit estimator multiplies by the very matrix that the explicit one forms with the same key."""
    case, key = make_case("mlp", "softmax"), jax.random.key(7)
    explicit, implicit = kfax.ExplicitExactCurvature(source), kfax.ImplicitExactCurvature(source)
    matrix = explicit.to_dense(updated(explicit, case, key=key), parameters(case.model))
    v = like(case, 1)
    assert_close(flat(implicit.multiply(updated(implicit, case, key=key), v)), matrix @ flat(v))
    other = explicit.to_dense(updated(explicit, case, key=jax.random.key(8)), parameters(case.model))
    assert jnp.linalg.norm(other - matrix) > 0.1 * jnp.linalg.norm(matrix)
    assert jnp.linalg.matrix_rank(matrix) <= 6 * source.num_samples


@pytest.mark.parametrize("source", [kfax.SampledFisher(), kfax.CurvaturePropagation()], ids=["sampled", "signs"])
def test_sampled_matrices_are_unbiased(source):
    case = make_case("mlp", "softmax", num_examples=2)
    explicit = kfax.ExplicitExactCurvature(source)
    v = like(case, 1)
    implicit = kfax.ImplicitExactCurvature(source)

    @jax.jit
    def draw(key):
        state = implicit.update(implicit.init(case.model), case.loss_fn, case.model, case.batch, key=key)
        return flat(implicit.multiply(state, v))

    draws = jax.lax.map(draw, jax.random.split(jax.random.key(1), 2000), batch_size=100)
    errors = draws.std(0) / jnp.sqrt(len(draws))
    expected = truth(case, "ggn") @ flat(v)
    # Five standard errors for each of 84 entries.
    assert jnp.all(jnp.abs(draws.mean(0) - expected) <= 5 * errors + 1e-12)
    assert explicit.init(case.model).average.weight == 0


def test_every_update_counts_by_its_weight():
    case = make_case("mlp", "softmax")
    explicit = kfax.ExplicitExactCurvature(decay=1.0)
    state = explicit.init(case.model)
    for part in (slice(0, 1), slice(1, 6)):
        state = explicit.update(state, case.loss_fn, case.model, (case.x[part], case.y[part]))
    assert_close(explicit.to_dense(state, parameters(case.model)), truth(case, "ggn"))


@grid(thin=2, model=MODELS)
def test_gram_of_the_exact_ggn(model):
    case = make_case(model, "softmax")
    p = parameters(case.model)
    vectors = [jax.tree.map(lambda x, s=s: jnp.sin(jnp.arange(x.size) * s + 1).reshape(x.shape), p) for s in (1.0, 2.0)]
    exact = kfax.ImplicitExactCurvature()
    state = exact.update(exact.init(case.model), case.loss_fn, case.model, case.batch)
    gram = eqx.filter_jit(exact.gram)(state, vectors)
    flat = jnp.stack([ravel_pytree(v)[0] for v in vectors])
    matrix = ggn(case.outputs, p, case.one, case.y)
    assert_close(gram, flat @ matrix @ flat.T)


# -- models that other approaches cannot differentiate, or approximate --


def test_batch_normalization_is_differentiated_through():
    class Normalized(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __call__(self, x, state):
            y, state = self.norm(self.first(x), state)
            return self.last(jnp.tanh(y)), state

    keys = jax.random.split(jax.random.key(0), 3)
    norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
    first, last = eqx.nn.Linear(5, 4, key=keys[0]), eqx.nn.Linear(4, 3, key=keys[1])
    model, state = Normalized(first, norm, last), eqx.nn.State(norm)
    tagged = kfax.tag(model)
    x, y = jax.random.normal(keys[2], (6, 5)), jnp.arange(6) % 3

    def run(model, state):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    def loss_fn(model, batch, model_state):
        outputs, model_state = run(model, model_state)
        return kfax.softmax_cross_entropy(outputs, batch[1]), model_state

    def outputs(p):
        return run(kfax.untag(eqx.combine(p, tagged)), state)[0]

    estimator = kfax.ImplicitExactCurvature()
    held = estimator.update(estimator.init(tagged), loss_fn, tagged, (x, y), model_state=state)
    # The initial state of the layer is no parameter.
    p = kfax.parameters_of(tagged)
    assert len(jax.tree.leaves(p)) == len(jax.tree.leaves(parameters(tagged))) - 2
    assert_close(estimator.to_dense(held, p), ggn(outputs, p, softmax_loss, y))
    with pytest.raises(ValueError, match="shapes of the parameters. Vectors are like `kfax.parameters_of"):
        estimator.multiply(held, parameters(tagged))


@jax.custom_vjp
def _reverse_only(x):
    return jnp.tanh(x)


_reverse_only.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, dy: ((1 - y**2) * dy,))


@grid(source=SOURCES)
def test_models_without_forward_mode(source):
    case = make_case(mlp(jax.random.key(3), (8, 4, 3), activation=_reverse_only), "softmax")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda p: case.outputs(p), (parameters(case.model),), (parameters(case.model),))
    plain = make_case(mlp(jax.random.key(3), (8, 4, 3)), "softmax")
    estimator = kfax.ImplicitExactCurvature(SOURCES[source])
    v = like(case, 1)
    found = estimator.multiply(updated(estimator, case), v)
    assert_close(flat(found), truth(plain, source) @ flat(v))


def test_losses_with_derivatives_of_the_model():
    """What the slots cannot observe, the exact estimators can differentiate."""
    model = kfax.tag(mlp(jax.random.key(3), (2, 5, 1)))
    x = jax.random.normal(jax.random.key(4), (6, 2))

    def residuals(model):
        def one(x):
            u = lambda z: model(z)[0]  # noqa: E731
            return jnp.trace(jax.hessian(u)(x)) + u(x) ** 2

        return jax.vmap(one)(x)

    def loss_fn(model, batch):
        return kfax.squared_error(residuals(model), jnp.sin(batch[:, 0]))

    p, rest = eqx.partition(model, eqx.is_inexact_array)
    expected = ggn(lambda p: residuals(eqx.combine(p, rest)), p, lambda f, y: (f - y) ** 2, jnp.sin(x[:, 0]))
    estimator = kfax.ImplicitExactCurvature()
    state = estimator.update(estimator.init(model), loss_fn, model, x)
    assert_close(estimator.to_dense(state, p), expected)


def test_penalties_count_in_the_hessian_only():
    case = make_case("mlp", "squared")

    def loss_fn(model, batch):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(parameters(model)))
        return [case.loss_fn(model, batch), kfax.Penalty(0.5 * squares)]

    p = parameters(case.model)
    for source, extra in (("ggn", 0.0), ("empirical", 0.0), ("hessian", 1.0)):
        estimator = kfax.ExplicitExactCurvature(SOURCES[source])
        state = estimator.update(estimator.init(case.model), loss_fn, case.model, case.batch)
        expected = truth(case, source)
        assert_close(estimator.to_dense(state, p), expected + extra * jnp.eye(len(expected)))


# -- without tags --


@grid(thin=2, source=SOURCES)
def test_exact_estimators_need_no_tags(source):
    case = make_case("mlp", "softmax")
    plain, v = kfax.untag(case.model), like(case, 1)
    for estimator in (kfax.ExplicitExactCurvature(SOURCES[source]), kfax.ImplicitExactCurvature(SOURCES[source])):
        state = estimator.update(estimator.init(plain), case.loss_fn, plain, case.batch)
        product = estimator.multiply(state, kfax.untag(v))
        assert_close(flat(product), truth(case, source) @ flat(v))
        with pytest.raises(ValueError, match="parameters_of"):
            estimator.multiply(state, {"weight": jnp.ones(3)})

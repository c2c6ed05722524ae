"""What a step computes, against dense computations: its direction, its coefficients and the damping after it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from cases import grid, make_case
from helpers import as_it_is, assert_close, mlp, parameters
from jax.flatten_util import ravel_pytree
from optimizer_cases import adaptive, begin, exact_ggn, fixed
from reference import ggn

import kfax


def quadratic_case(use_bias=True):
    """One dense layer and squared error: the loss is a quadratic function, and the GGN its Hessian."""
    return make_case(mlp(jax.random.key(2), (8, 3), use_bias=use_bias), "squared", num_examples=20)


def objective(case, l2):
    def value(flat):
        outputs = case.outputs(unravel(flat))
        return jnp.mean(jnp.sum((outputs - case.y) ** 2, axis=1)) + l2 / 2 * flat @ flat

    flat, unravel = ravel_pytree(parameters(case.model))
    return value, flat


def test_two_directions_reach_the_minimum_of_their_plane():
    case = quadratic_case()
    optimizer = adaptive(case.loss_fn, damping=1e-12, l2=1e-2, preconditioner=exact_ggn(1))
    # λ enters the plane's model; this one is negligible there, and given to the preconditioner at each step.
    value, _ = objective(case, 1e-2)
    model, state = case.model, begin(optimizer, case)
    for _ in range(4):
        before = ravel_pytree(parameters(model))[0]
        velocity = ravel_pytree(state.velocity)[0]
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch)
        after = ravel_pytree(parameters(model))[0]
        gradient = jax.grad(value)(after)
        direction = (after - before - info.momentum * velocity) / info.learning_rate
        scale = jnp.linalg.norm(jax.grad(value)(before))
        for v in (direction, velocity):
            assert abs(gradient @ v) <= 1e-9 * scale * (jnp.linalg.norm(v) + 1e-300)
        # The change is a difference of two larger numbers.
        assert_close(info.predicted_change, value(after) - value(before), tolerance=1e-8)
        if jnp.linalg.norm(gradient) < 1e-9:
            break


@grid(use_bias=[True, False], source=["ExactGGN", "many samples"])
def test_one_undamped_step_solves_a_regression(use_bias, source):
    """Exact case 6: one dense layer with squared error."""
    case = quadratic_case(use_bias)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    if source != "ExactGGN":
        # G is a multiple of the identity whatever is sampled only in the mean: another preconditioner, no solution.
        estimator = kfax.BlockDiagonalCurvature(kfax.SampledFisher(3))
    optimizer = fixed(
        case.loss_fn,
        learning_rate=as_it_is(1.0),
        momentum=0.0,
        damping=1e-12,
        l2=0.0,
        preconditioner=kfax.Preconditioner(estimator),
    )
    state = begin(optimizer, case)
    model, _, info = eqx.filter_jit(optimizer.step)(case.model, state, case.batch, key=jax.random.key(0))
    value, _ = objective(case, 0.0)
    after = jnp.linalg.norm(jax.grad(value)(ravel_pytree(parameters(model))[0])) / info.gradient_norm
    # The damping leaves about its square root, 1e-6.
    assert (after < 1e-4) == (source == "ExactGGN")


@grid(thin=2, learning_rate=["model", 0.3], momentum=["model", 0.5])
def test_coefficients_minimize_the_damped_model_and_the_ratio_compares(learning_rate, momentum):
    """Against a dense computation of the whole step on a nonlinear network."""
    case = make_case("mlp", "softmax", num_examples=9)
    lam, l2 = 0.2, 0.05
    pick = lambda c: kfax.QuadraticModel() if c == "model" else c  # noqa: E731
    optimizer = adaptive(
        case.loss_fn,
        learning_rate=pick(learning_rate),
        momentum=pick(momentum),
        damping=kfax.LevenbergMarquardt(lam, period=1, decay=0.9),
        l2=l2,
        preconditioner=exact_ggn(1),
    )
    model, state = case.model, begin(optimizer, case)
    flat, unravel = ravel_pytree(parameters(model))

    def value(flat):
        return jnp.mean(jax.vmap(case.one)(case.outputs(unravel(flat)), case.y)) + l2 / 2 * flat @ flat

    for i in range(3):
        theta, lam = ravel_pytree(parameters(model))[0], state.damping
        velocity = ravel_pytree(state.velocity)[0]
        gradient = jax.grad(value)(theta)
        estimator = optimizer.estimator
        curvature = eqx.filter_jit(estimator.update)(state.curvature, case.loss_fn, model, case.batch)
        curvature = eqx.filter_jit(estimator.refresh)(curvature, parameters(model), lam + l2)
        descent = -ravel_pytree(estimator.solve(curvature, unravel(gradient)))[0]
        matrix = ggn(case.outputs, unravel(theta), case.one, case.y) + l2 * jnp.eye(theta.size)
        damped = matrix + lam * jnp.eye(theta.size)
        basis = jnp.stack([descent, velocity], axis=1)
        q, b = basis.T @ damped @ basis, basis.T @ gradient
        if learning_rate == momentum == "model":
            expected = -jnp.linalg.lstsq(q, b)[0] if i == 0 else -jnp.linalg.solve(q, b)
        elif learning_rate == "model":
            expected = jnp.array([-(b[0] + q[0, 1] * 0.5) / q[0, 0], 0.5])
        elif momentum == "model":
            expected = jnp.array([0.3, 0.0 if i == 0 else -(b[1] + q[0, 1] * 0.3) / q[1, 1]])
        else:
            expected = jnp.array([0.3, 0.5])
        step = basis @ expected
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch)
        # The two directions are nearly dependent: their 2x2 system, and what follows from it, is ill-conditioned.
        assert_close(jnp.stack([info.learning_rate, info.momentum]), expected, tolerance=1e-8)
        assert_close(ravel_pytree(parameters(model))[0], theta + step)
        assert_close(info.loss, value(theta))
        assert_close(info.gradient_norm, jnp.linalg.norm(gradient))
        assert_close(info.update_norm, jnp.linalg.norm(step), tolerance=1e-8)
        if learning_rate == "model" or momentum == "model":
            model_matrix = matrix
        else:
            model_matrix = estimator.to_dense(curvature, parameters(model)) + l2 * jnp.eye(theta.size)
        predicted = gradient @ step + step @ model_matrix @ step / 2
        assert_close(info.predicted_change, predicted, tolerance=1e-8)
        ratio = (value(theta + step) - value(theta)) / predicted
        assert_close(info.reduction_ratio, ratio, tolerance=1e-7)
        factor = 0.9 if ratio > 0.75 else (1 / 0.9 if ratio < 0.25 else 1.0)
        assert_close(state.damping, lam * factor)


def test_fixed_coefficients_follow_the_formula():
    case = quadratic_case()
    l2 = 1e-2
    optimizer = fixed(case.loss_fn, l2=l2, preconditioner=exact_ggn(1))
    value, flat = objective(case, l2)
    _, unravel = ravel_pytree(parameters(case.model))
    model, state = case.model, begin(optimizer, case)
    velocity = jnp.zeros_like(flat)
    for _ in range(3):
        theta = ravel_pytree(parameters(model))[0]
        curvature = eqx.filter_jit(optimizer.estimator.update)(state.curvature, case.loss_fn, model, case.batch)
        curvature = optimizer.estimator.refresh(curvature, parameters(model), jnp.asarray(0.5 + l2))
        natural = optimizer.estimator.solve(curvature, unravel(jax.grad(value)(theta)))
        velocity = -0.1 * ravel_pytree(natural)[0] + 0.9 * velocity
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch)
        assert_close(ravel_pytree(parameters(model))[0], theta + velocity)
        assert jnp.isnan(info.predicted_change) and jnp.isnan(info.reduction_ratio)


def test_levenberg_marquardt_moves_as_the_paper_says():
    rule = kfax.LevenbergMarquardt(1.0, decay=0.95, period=5, minimum=0.5, maximum=1.2)
    factor = 0.95**5
    for ratio, expected in [(0.76, factor), (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.24, 1.2), (-3.0, 1.2)]:
        assert_close(rule.update(jnp.asarray(1.0), jnp.asarray(ratio)), jnp.asarray(expected))
    assert rule.update(jnp.asarray(1.0), jnp.asarray(jnp.nan)) == 1.2
    assert rule.update(jnp.asarray(0.5), jnp.asarray(1.0)) == 0.5
    assert [bool(rule.wants_ratio(jnp.asarray(i))) for i in range(6)] == [False] * 4 + [True, False]

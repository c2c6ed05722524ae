"""Inverses, powers and eigendecompositions of exact estimators, as operators and in the optimizer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import pytest
from cases import grid, make_case, MODELS
from exact_cases import like, truth, updated
from helpers import assert_close, flat, layer_groups, mlp, parameters

import kfax


# -- inverses and powers --


@grid(inversion=["cholesky", "eigh"])
def test_explicit_inverse_power_and_spectrum(inversion):
    case = make_case("mlp", "softmax")
    estimator = kfax.ExplicitExactCurvature(inversion={"cholesky": kfax.Cholesky(), "eigh": kfax.Eigh()}[inversion])
    state, p, v = updated(estimator, case), parameters(case.model), like(case, 1)
    assert not jnp.any(flat(estimator.solve(estimator.init(case.model), v)))
    expected = truth(case, "ggn")
    eye, (values, vectors) = jnp.eye(len(expected)), jnp.linalg.eigh(expected)
    refreshed = estimator.refresh(state, p, 0.1)
    assert_close(flat(estimator.solve(refreshed, v)), jnp.linalg.solve(expected + 0.1 * eye, flat(v)))
    assert_close(flat(estimator.as_preconditioner(refreshed, p).mv(v)), flat(estimator.solve(refreshed, v)))
    redamped = estimator.solve(estimator.redamp(refreshed, p, 0.5), v)
    other = 0.5 if inversion == "eigh" else 0.1
    assert_close(flat(redamped), jnp.linalg.solve(expected + other * eye, flat(v)))
    # Most eigenvalues are zero: in the matrix up to 1e-16, in the factorization too.
    assert_close(jnp.sort(estimator.eigenvalues(state, p)), jnp.maximum(values, 0))
    assert_close(flat(estimator.diagonal(state, p)), jnp.diag(expected))
    root = (vectors * (values + 0.1) ** -0.5) @ vectors.T
    assert_close(flat(estimator.power(state, v, -0.5, 0.1)), root @ flat(v))
    found = estimator.decompose(state, p)
    assert_close(found.logdet(0.1), jnp.linalg.slogdet(expected + 0.1 * eye)[1])
    assert_close(found.trace(), jnp.trace(expected))
    assert_close(flat(found.diagonal(p, -1, 0.1)), jnp.diag(jnp.linalg.inv(expected + 0.1 * eye)))


def test_explicit_hessian_keeps_its_negative_eigenvalues():
    case = make_case("mlp", "squared")
    estimator = kfax.ExplicitExactCurvature(kfax.Hessian(), inversion=kfax.Eigh())
    state, p, v = updated(estimator, case), parameters(case.model), like(case, 1)
    expected = truth(case, "hessian")
    values = jnp.linalg.eigvalsh(expected)
    assert values[0] < -0.01
    assert_close(jnp.sort(estimator.eigenvalues(state, p)), values)
    refreshed = estimator.refresh(state, p, 2.0)
    assert_close(flat(estimator.solve(refreshed, v)), jnp.linalg.solve(expected + 2 * jnp.eye(len(values)), flat(v)))
    assert not lx.is_positive_semidefinite(estimator.as_operator(state, p))
    assert lx.is_symmetric(estimator.as_operator(state, p))


@grid(preconditioner=["none", "kronecker", "explicit"])
def test_implicit_solve(preconditioner):
    case = make_case("mlp", "softmax")
    inner = {
        "none": None,
        "kronecker": kfax.BlockDiagonalCurvature(kfax.ExactGGN()),
        "explicit": kfax.ExplicitExactCurvature(),
    }[preconditioner]
    estimator = kfax.ImplicitExactCurvature(preconditioner=inner, solver=lx.CG(rtol=1e-12, atol=1e-12))
    p, v = parameters(case.model), like(case, 1)
    state = eqx.filter_jit(estimator.refresh)(updated(estimator, case), p, 0.1)
    expected = truth(case, "ggn") + 0.1 * jnp.eye(flat(v).size)
    solved = eqx.filter_jit(estimator.solve)(state, v)
    # As exact as conjugate gradients are asked to be.
    assert_close(flat(solved), jnp.linalg.solve(expected, flat(v)), tolerance=1e-9)
    again = estimator.solve(estimator.redamp(state, p, 0.4), v)
    shifted = expected + 0.3 * jnp.eye(len(expected))
    assert_close(flat(again), jnp.linalg.solve(shifted, flat(v)), tolerance=1e-9)


def test_implicit_solve_in_single_precision():
    """Where the damping is far below what conjugate gradients by themselves would take for zero."""
    case = make_case("mlp", "softmax")
    model, batch = jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, (case.model, case.batch)
    )
    estimator = kfax.ImplicitExactCurvature(solver=lx.CG(rtol=1e-4, atol=1e-4))
    state = estimator.update(estimator.init(model), case.loss_fn, model, batch)
    v = jax.tree.map(lambda x: x.astype(jnp.float32), like(case, 1))
    solved = flat(estimator.solve(estimator.refresh(state, v, 1e-4), v))
    expected = jnp.linalg.solve(truth(case, "ggn") + 1e-4 * jnp.eye(solved.size), flat(v).astype(float))
    assert solved.dtype == jnp.float32
    # As exact as conjugate gradients are asked to be.
    assert_close(solved.astype(float), expected, tolerance=1e-3)


@grid(preconditioned=[False, True])
def test_implicit_solve_does_not_depend_on_the_size_of_the_vector(preconditioned):
    case = make_case("mlp", "softmax")
    inner = kfax.BlockDiagonalCurvature(kfax.ExactGGN()) if preconditioned else None
    estimator = kfax.ImplicitExactCurvature(preconditioner=inner)
    p, v = parameters(case.model), like(case, 1)
    state = estimator.refresh(updated(estimator, case), p, 0.1)
    solve = eqx.filter_jit(estimator.solve)
    expected = jnp.linalg.solve(truth(case, "ggn") + 0.1 * jnp.eye(flat(v).size), flat(v))
    for c in (1.0, 1e-9, 1e-30, 1e6):
        found = flat(solve(state, jax.tree.map(lambda x, c=c: c * x, v))) / c
        assert_close(found, expected, tolerance=1e-4)  # what conjugate gradients are asked for
    zero = jax.tree.map(jnp.zeros_like, v)
    assert_close(solve(state, zero), zero)
    # Nothing that is not finite looks like a solution.
    spoiled = eqx.tree_at(lambda t: t.layers[0].layer.bias, v, v.layers[0].layer.bias.at[0].set(jnp.nan))
    assert jnp.all(jnp.isnan(flat(solve(state, spoiled))))
    assert jnp.all(jnp.isnan(flat(solve(eqx.filter_jit(estimator.refresh)(state, p, jnp.asarray(jnp.nan)), v))))
    batch = (case.x.at[0, 0].set(jnp.nan), case.y)
    broken = estimator.update(estimator.init(case.model), case.loss_fn, case.model, batch)
    assert jnp.all(jnp.isnan(flat(solve(estimator.refresh(broken, p, 0.1), v))))


def test_implicit_solve_says_if_it_does_not_converge():
    case = make_case("mlp", "softmax")
    estimator = kfax.ImplicitExactCurvature(solver=lx.CG(rtol=1e-12, atol=1e-12, max_steps=2))
    state = estimator.refresh(updated(estimator, case), parameters(case.model), 1e-4)
    with pytest.raises(Exception, match="did not converge. Before the first `refresh`.* loosen the tolerances"):
        jax.block_until_ready(estimator.solve(state, like(case, 1)))
    hessian = kfax.ImplicitExactCurvature(kfax.Hessian())
    with pytest.raises(ValueError, match="may be indefinite. Use"):
        hessian.solve(updated(hessian, case), like(case, 1))
    general = kfax.ImplicitExactCurvature(kfax.Hessian(), solver=lx.GMRES(rtol=1e-8, atol=1e-8))
    state, v = general.refresh(updated(general, case), parameters(case.model), 2.0), like(case, 1)
    expected = jnp.linalg.solve(truth(case, "hessian") + 2 * jnp.eye(flat(v).size), flat(v))
    assert_close(flat(general.solve(state, v)), expected, tolerance=1e-6)  # what GMRES is asked for


@grid(thin=2, dtypes=["mixed", "bfloat16"])
def test_half_precision_parameters(dtypes):
    """Solvers work in float32 at least, whatever the parameters are."""
    case = make_case("mlp", "softmax")

    def low(path, leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        half = dtypes == "bfloat16" or "layers[0]" in jax.tree_util.keystr(path)
        return leaf.astype(jnp.bfloat16 if half else jnp.float32)

    model = jax.tree_util.tree_map_with_path(low, case.model)
    batch = (case.x.astype(jnp.float32), case.y)
    p = kfax.parameters_of(model)
    blocks, exact = kfax.BlockDiagonalCurvature(kfax.ExactGGN()), kfax.ImplicitExactCurvature(solver=lx.CG(1e-2, 1e-2))
    state = exact.refresh(exact.update(exact.init(model), case.loss_fn, model, batch), p, 0.5)
    v = jax.tree.map(jnp.ones_like, p)
    solved = exact.solve(state, v)
    assert jax.tree.map(lambda x: x.dtype, solved) == jax.tree.map(lambda x: x.dtype, p)
    expected = jnp.linalg.solve(truth(case, "ggn") + 0.5 * jnp.eye(flat(v).size), jnp.ones(flat(v).size))
    assert_close(flat(solved).astype(float), expected, tolerance=0.05)  # bfloat16 has three digits
    inner = blocks.update(blocks.init(model), case.loss_fn, model, batch)
    operator = blocks.as_operator(inner, p, 0.5)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), v)
    options = {"preconditioner": blocks.as_preconditioner(blocks.refresh(inner, p, 0.5), p)}
    assert jnp.all(jnp.isfinite(flat(lx.linear_solve(operator, wide, lx.CG(1e-2, 1e-2), options=options).value)))
    assert blocks.to_dense(inner, p).dtype == jnp.float32


@grid(exponent=[-2, -1, 0, 1, 3])
def test_implicit_integer_powers(exponent):
    case = make_case("mlp", "softmax")
    estimator = kfax.ImplicitExactCurvature(solver=lx.CG(rtol=1e-13, atol=1e-13))
    v = like(case, 1)
    found = estimator.power(updated(estimator, case), v, exponent, 0.1)
    expected = jnp.linalg.matrix_power(truth(case, "ggn") + 0.1 * jnp.eye(flat(v).size), exponent)
    # Conjugate gradients, twice for -2.
    assert_close(flat(found), expected @ flat(v), tolerance=1e-8)


@grid(thin=2, estimator=["blocks", "explicit", "implicit"])
def test_a_damping_for_each_block(estimator):
    case = make_case("mlp", "squared")
    made = {
        "blocks": kfax.BlockDiagonalCurvature(kfax.ExactGGN()),
        "explicit": kfax.ExplicitExactCurvature(inversion=kfax.Eigh()),
        "implicit": kfax.ImplicitExactCurvature(solver=lx.CG(rtol=1e-12, atol=1e-12)),
    }[estimator]
    paths = [row.path for row in kfax.coverage(case.model).rows]
    damping = dict(zip(paths, (0.1, 0.5, 2.0), strict=True))
    p, v = parameters(case.model), like(case, 1)
    groups = layer_groups(case.model, paths)
    state = made.refresh(updated(made, case), p, damping)
    if estimator == "blocks":
        pairs = [made.refresh(state, p, value) for value in damping.values()]
        solved = jnp.stack([flat(made.solve(each, v)) for each in pairs])
        expected = solved[groups, jnp.arange(groups.size)]
    else:
        shift = jnp.array(list(damping.values()))[groups]
        expected = jnp.linalg.solve(truth(case, "ggn") + jnp.diag(shift), flat(v))
        more = made.redamp(state, p, {path: value + 0.2 for path, value in damping.items()})
        again = jnp.linalg.solve(truth(case, "ggn") + jnp.diag(shift + 0.2), flat(v))
        assert_close(flat(made.solve(more, v)), again, tolerance=1e-9)
    assert_close(flat(made.solve(state, v)), expected, tolerance=1e-9)


# -- as linear operators --


@grid(thin=2, estimator=["blocks", "explicit", "implicit"])
def test_lineax_solves_with_every_operator(estimator):
    case = make_case("attention", "softmax")
    made = {
        "blocks": kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch"),
        "explicit": kfax.ExplicitExactCurvature(),
        "implicit": kfax.ImplicitExactCurvature(),
    }[estimator]
    blocks = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    p, v = parameters(case.model), like(case, 1)
    state, inner = updated(made, case), updated(blocks, case)

    @eqx.filter_jit
    def solve(state, inner):
        operator = made.as_operator(state, p, 0.1)
        preconditioner = blocks.as_preconditioner(blocks.refresh(inner, p, 0.1), p)
        assert lx.is_positive_semidefinite(operator)
        assert operator.in_structure() == jax.eval_shape(lambda: p)
        solver = lx.CG(rtol=1e-12, atol=1e-12)
        return lx.linear_solve(operator, v, solver, options={"preconditioner": preconditioner}).value

    matrix = made.to_dense(state, p) + 0.1 * jnp.eye(flat(v).size)
    assert_close(flat(solve(state, inner)), jnp.linalg.solve(matrix, flat(v)), tolerance=1e-9)


def test_a_preconditioner_saves_iterations():
    case = make_case(mlp(jax.random.key(3), (8, 3)), "squared", num_examples=40)
    blocks, exact = kfax.BlockDiagonalCurvature(kfax.ExactGGN()), kfax.ImplicitExactCurvature()
    p, v = parameters(case.model), like(case, 1)
    operator = exact.as_operator(updated(exact, case), p, 1e-3)
    preconditioner = blocks.as_preconditioner(blocks.refresh(updated(blocks, case), p, 1e-3), p)
    plain, preconditioned = (
        lx.linear_solve(operator, v, lx.CG(rtol=1e-6, atol=1e-6), options=options).stats["num_steps"]
        for options in ({}, {"preconditioner": preconditioner})
    )
    assert preconditioned < 0.5 * plain


# -- the whole model's eigendecomposition --


@grid(thin=2, model=MODELS)
def test_eigendecomposition_of_blocks(model):
    case = make_case(model, "softmax")
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis="batch")
    state, p, v = updated(estimator, case), parameters(case.model), like(case, 1)
    matrix = estimator.to_dense(state, p)
    values, vectors = jnp.linalg.eigh(matrix)
    found = eqx.filter_jit(estimator.decompose)(state, p)
    assert_close(jnp.sort(found.eigenvalues()), jnp.maximum(values, 0))
    assert_close(flat(estimator.diagonal(state, p)), jnp.diag(matrix))
    for damping in (0.01, 0.3):
        damped = matrix + damping * jnp.eye(len(matrix))
        for exponent in (-1, -0.5, 1, 0.7):
            expected = (vectors * (jnp.maximum(values, 0) + damping) ** exponent) @ vectors.T
            assert_close(flat(found.power(v, exponent, damping)), expected @ flat(v))
            assert_close(flat(found.diagonal(p, exponent, damping)), jnp.diag(expected))
        assert_close(found.logdet(damping), jnp.linalg.slogdet(damped)[1])
    assert_close(found.trace(), jnp.trace(matrix))
    assert_close(flat(estimator.power(state, v, 0.5)), flat(found.power(v, 0.5)))


def test_one_eigendecomposition_serves_many_dampings():
    case = make_case("mlp", "softmax")
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state, p, v = updated(estimator, case), parameters(case.model), like(case, 1)
    found, matrix = estimator.decompose(state, p), estimator.to_dense(state, p)
    dampings = jnp.array([0.01, 0.1, 1.0])
    logdets = jax.vmap(found.logdet)(dampings)
    expected = jnp.stack([jnp.linalg.slogdet(matrix + d * jnp.eye(len(matrix)))[1] for d in dampings])
    assert_close(logdets, expected)
    solved = eqx.filter_vmap(lambda d: flat(found.power(v, -1, d)))(dampings)
    assert_close(solved[1], jnp.linalg.solve(matrix + 0.1 * jnp.eye(len(matrix)), flat(v)))


# -- in the optimizer --


def test_the_optimizer_refreshes_an_implicit_estimator_now_and_then():
    case = make_case("mlp", "softmax")
    blocks = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    optimizer = kfax.Optimizer(
        case.loss_fn,
        learning_rate=0.5,
        momentum=0.0,
        damping=0.1,
        preconditioner=kfax.Preconditioner(kfax.ImplicitExactCurvature(preconditioner=blocks), inverse_update_period=2),
    )
    model, state, losses = case.model, optimizer.init(case.model, case.batch), []
    for i in range(4):
        model, state, info = eqx.filter_jit(optimizer.step)(model, state, case.batch, key=jax.random.key(i))
        losses.append(float(info.loss))
    assert losses == sorted(losses, reverse=True)


@grid(thin=2, estimator=["cholesky", "eigh", "implicit", "preconditioned"])
def test_a_newton_step_solves_a_linear_regression(estimator):
    solver = lx.CG(rtol=1e-13, atol=1e-13)
    made = {
        "cholesky": kfax.ExplicitExactCurvature(),
        "eigh": kfax.ExplicitExactCurvature(inversion=kfax.Eigh()),
        "implicit": kfax.ImplicitExactCurvature(solver=solver),
        "preconditioned": kfax.ImplicitExactCurvature(
            preconditioner=kfax.BlockDiagonalCurvature(kfax.ExactGGN()), solver=solver
        ),
    }[estimator]
    case = make_case(mlp(jax.random.key(3), (8, 3)), "squared", num_examples=20)
    optimizer = kfax.Optimizer(
        case.loss_fn,
        learning_rate=1.0,
        momentum=0.0,
        damping=1e-9,
        preconditioner=kfax.Preconditioner(made, inverse_update_period=1),
    )
    state = optimizer.init(case.model, case.batch)
    model = case.model
    for i in range(2):
        model, state, _ = eqx.filter_jit(optimizer.step)(model, state, case.batch, key=jax.random.key(i))
    x = jnp.concatenate([case.x, jnp.ones((20, 1))], axis=1)
    expected = jnp.linalg.lstsq(x, case.y)[0].T
    [layer] = kfax.untag(model).layers
    # What the damping leaves.
    assert_close(jnp.concatenate([layer.weight, layer.bias[:, None]], axis=1), expected, tolerance=1e-7)

"""The exact estimators, explicit and implicit, against dense matrices from jacobians and Hessians, in float64."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import pytest
from cases import grid, LOSSES, make_case, MODELS
from helpers import assert_close, layer_groups, mlp, parameters
from jax.flatten_util import ravel_pytree
from reference import block_diagonal, ggn, jacobians, softmax_loss

import kfax


SOURCES = {
    "ggn": kfax.ExactGGN(),
    "fisher": kfax.ExactFisher(),
    "empirical": kfax.EmpiricalFisher(),
    "hessian": kfax.Hessian(),
}


def truth(case, source, weights=None):
    """The matrix that a source stands for; for the three losses of the table GGN and Fisher are one."""
    p = parameters(case.model)
    if source in ("ggn", "fisher"):
        return ggn(case.outputs, p, case.one, case.y, weights)
    flat, unravel = ravel_pytree(p)
    w = jnp.ones(len(case.x)) if weights is None else weights

    def losses(v):
        return jax.vmap(case.one)(case.outputs(unravel(v)), case.y)

    if source == "hessian":
        return jax.jit(jax.hessian(lambda v: losses(v) @ w / w.sum()))(flat)
    gradients = jax.jit(jax.jacrev(losses))(flat)
    return jnp.einsum("n,ni,nj->ij", w / w.sum(), gradients, gradients)


def updated(estimator, case, key=None, **options):
    @eqx.filter_jit
    def run(model, batch):
        return estimator.update(estimator.init(model), case.loss_fn, model, batch, key=key, **options)

    return run(case.model, case.batch)


def like(case, seed):
    flat, unravel = ravel_pytree(parameters(case.model))
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape))


def flat(tree):
    return ravel_pytree(tree)[0]


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


# -- refusals --


def test_vectors_that_do_not_fit():
    model = kfax.tag(mlp(jax.random.key(0), (3, 3, 3)))
    p = kfax.parameters_of(model)
    first, second = (kfax.parameters_of(model, frozen=lambda m, i=i: m.layers[i]) for i in (0, 2))

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(model)(batch), batch)

    x = jnp.ones((4, 3))
    two: list[Any] = [kfax.ExplicitExactCurvature(), kfax.BlockDiagonalCurvature(kfax.ExactGGN())]
    for estimator in two:
        state = estimator.init(model, frozen=lambda m: m.layers[0])
        for call in (
            lambda e=estimator, s=state: e.solve(s, second),
            lambda e=estimator, s=state: e.multiply(s, p),
            lambda e=estimator, s=state: e.refresh(s, second, 0.1),
            lambda e=estimator, s=state: e.decompose(s, p),
            lambda e=estimator, s=state: e.update(s, loss_fn, model, x, frozen=lambda m: m.layers[2]),
        ):
            with pytest.raises(ValueError, match="Vectors are like `kfax.parameters_of"):
                call()
        assert estimator.solve(state, first) is not None
    for estimator in (*two, kfax.ImplicitExactCurvature()):
        for damping, message in (
            ({".layers[0]": 0.1}, "have one for each of"),
            ({".layers[0]": 0.1, ".layers[2]": 0.1, ".head": 0.1}, "have one for each of"),
            (-1.0, "must not be negative"),
        ):
            with pytest.raises(ValueError, match=message):
                estimator.refresh(estimator.init(model), p, damping)


def test_vectors_of_another_model():
    """An untagged gradient, raveled parameters, and as many numbers in other shapes: nothing is returned as it was."""
    plain = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    model, other = kfax.tag(plain), kfax.tag(eqx.nn.Linear(1, 4, key=jax.random.key(0)))
    p = kfax.parameters_of(model)

    class Pair(eqx.Module):
        first: Any
        second: Any

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(model)(batch), batch[:, :2])

    for estimator in (kfax.BlockDiagonalCurvature(kfax.ExactGGN()), kfax.ExplicitExactCurvature()):
        state: Any = estimator.update(estimator.init(model), loss_fn, model, jnp.ones((4, 3)))
        state = estimator.refresh(state, p, 0.1)
        found = estimator.decompose(state, p)
        for wrong in (plain, jnp.ones(8), kfax.parameters_of(other), Pair(model, jnp.ones(3)), ()):
            for call in (
                lambda v, f=found: f.power(v, -1, 0.1),
                lambda v, f=found: f.diagonal(v),
                lambda v, e=estimator, s=state: e.solve(s, v),
                lambda v, e=estimator, s=state: e.multiply(s, v),
                lambda v, e=estimator, s=state: e.power(s, v, -1, 0.1),
                lambda v, e=estimator, s=state: e.diagonal(s, v),
                lambda v, e=estimator, s=state: e.to_dense(s, v),
                lambda v, e=estimator, s=state: e.eigenvalues(s, v),
            ):
                with pytest.raises(ValueError, match="Vectors are like `kfax.parameters_of"):
                    call(wrong)


def test_vectors_with_arrays_that_belong_to_no_block():
    class Scaled(eqx.Module):
        linear: Any
        scale: jax.Array

    def frozen(model):
        return model.scale

    model = kfax.tag(Scaled(eqx.nn.Linear(3, 2, key=jax.random.key(0)), jnp.ones(3)), frozen=frozen)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    state = estimator.init(model, frozen=frozen)
    found = estimator.decompose(state, kfax.parameters_of(model, frozen=frozen))
    for call in (lambda v: estimator.multiply(state, v), lambda v: found.power(v, -1, 0.1)):
        with pytest.raises(ValueError, match="belong to no block.*frozen="):
            call(kfax.parameters_of(model))


def test_dampings_and_exponents_out_of_range():
    case = make_case("mlp", "softmax")
    p = parameters(case.model)
    two: list[Any] = [kfax.BlockDiagonalCurvature(kfax.ExactGGN()), kfax.ExplicitExactCurvature()]
    for estimator in two:
        found = estimator.decompose(estimator.init(case.model), p)
        for bad in (-0.1, jnp.nan, jnp.inf):
            for call in (
                lambda x, f=found: f.power(p, -1, x),
                lambda x, f=found: f.diagonal(p, -1, x),
                lambda x, f=found: f.logdet(x),
                lambda x, e=estimator: e.refresh(e.init(case.model), p, x),
                lambda x, e=estimator: e.redamp(e.init(case.model), p, x),
                lambda x, e=estimator: e.as_operator(e.init(case.model), p, x),
            ):
                with pytest.raises(ValueError, match="`damping` must not be negative or infinite"):
                    call(bad)
        for bad in (jnp.nan, jnp.inf):
            with pytest.raises(ValueError, match="`exponent` must be finite"):
                found.power(p, bad, 0.1)
            with pytest.raises(ValueError, match="`exponent` must be finite"):
                found.diagonal(p, bad, 0.1)


def test_an_array_of_dampings_wants_a_map():
    case = make_case("mlp", "softmax")
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    p = parameters(case.model)
    found = estimator.decompose(estimator.init(case.model), p)
    for call in (found.logdet, lambda d: found.power(p, -1, d), lambda d: found.diagonal(p, -1, d)):
        with pytest.raises(ValueError, match="single number, got an array of shape .*filter_vmap"):
            call(jnp.ones(4))


def test_what_cannot_be_had_says_so():
    case = make_case("mlp", "softmax")
    p, v = parameters(case.model), like(case, 1)
    implicit = kfax.ImplicitExactCurvature()
    empty, state = implicit.init(case.model), updated(implicit, case)
    with pytest.raises(ValueError, match="No batch was seen yet"):
        implicit.multiply(empty, v)
    for call, what in (
        (lambda: implicit.eigenvalues(state, p), "all eigenvalues"),
        (lambda: implicit.decompose(state, p), "an eigendecomposition"),
        (lambda: implicit.diagonal(state, p), "a diagonal"),
        (lambda: implicit.power(state, v, 0.5), "the power 0.5"),
    ):
        with pytest.raises(ValueError, match=f"{what} cannot be had. Use `kfax.ExplicitExactCurvature`"):
            call()
    hessian = kfax.ImplicitExactCurvature(kfax.Hessian())
    with pytest.raises(ValueError, match="has no factor"):
        hessian.multiply_factor_transpose(updated(hessian, case), v)
    with pytest.raises(ValueError, match=r"matrix of 84 parameters would take 0.0 GB.*max_dim=84"):
        kfax.ExplicitExactCurvature(max_dim=83).init(case.model)

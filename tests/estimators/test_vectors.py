"""Vectors, dampings and exponents that do not fit, and what an estimator cannot give."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import make_case
from exact_cases import like, updated
from helpers import mlp, parameters

import kfax


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
        (lambda: implicit.power(state, v, 0.5), "the power 0.5, whose `exponent` is no integer,"),
    ):
        with pytest.raises(ValueError, match=f"{what} cannot be had. Use `kfax.ExplicitExactCurvature`"):
            call()
    hessian = kfax.ImplicitExactCurvature(kfax.Hessian())
    with pytest.raises(ValueError, match="has no factor"):
        hessian.multiply_factor_transpose(updated(hessian, case), v)
    with pytest.raises(ValueError, match=r"matrix of 84 parameters would take 0.0 GB.*max_dim=84"):
        kfax.ExplicitExactCurvature(max_dim=83).init(case.model)

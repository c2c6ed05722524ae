"""Terms without curvature, and the number of what a `loss_fn` returns."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, random

import kfax
from kfax._capture import evaluate, linearize, Problem


KEY = jax.random.key(0)
F = jnp.ones((4, 2, 3))


def objective(result):
    return evaluate(lambda model, batch: result, None, None)


def test_penalties_are_added_to_the_losses():
    loss = kfax.squared_error(F[0], jnp.zeros((2, 3)))
    penalty = 2 * kfax.Penalty(3.0) * 0.5
    for result in ([loss, penalty], {"a": penalty, "b": loss}, ([[loss], penalty], "aux")):
        evaluation = objective(result)
        assert evaluation.losses == (loss,) or len(evaluation.losses) == 1
        assert_close(evaluation.penalty, jnp.array(3.0))
        assert_close(evaluation.value(), loss.value() + 3)
    assert_close(objective([kfax.Penalty(1.0), loss, kfax.Penalty(2.0)]).penalty, jnp.array(3.0))
    assert objective(loss).penalty == 0
    assert objective(([loss, penalty], "aux")).aux == "aux"


def test_the_gradient_is_that_of_losses_and_penalties():
    """Also through what the function of a loss closes over."""
    model, x, y = eqx.nn.Linear(3, 2, key=KEY), random(1, 5, 3), random(2, 5, 2)

    def cosh(f, y):
        return jnp.sum(jnp.log(jnp.cosh(f - y)))

    def loss_fn(model, batch):
        scale = jnp.sum(model.bias**2)
        loss = kfax.function_loss(lambda f, y: scale * cosh(f, y), jax.vmap(model)(x), y)
        return [loss, 0.5 * kfax.Penalty(jnp.sum(jnp.abs(model.weight)))]

    def plain(model):
        loss = jnp.sum(model.bias**2) * jnp.mean(jax.vmap(cosh)(jax.vmap(model)(x), y))
        return loss + 0.5 * jnp.sum(jnp.abs(model.weight))

    linearization = linearize(Problem(loss_fn, model, (x, y)))
    assert_close(linearization.evaluation.value(), plain(model))
    assert_close(linearization.gradient(), eqx.filter_grad(plain)(model))


def test_penalties_keep_their_digits():
    half = jnp.ones((), jnp.bfloat16)
    assert kfax.Penalty(half).value().dtype == jnp.float32
    assert kfax.Penalty(jnp.ones((), jnp.float64)).value().dtype == jnp.float64
    single = kfax.squared_error(jnp.ones((2, 3), jnp.float32), jnp.ones((2, 3)))
    assert objective(single).value().dtype == jnp.float32
    assert objective([single, kfax.Penalty(half)]).value().dtype == jnp.float32


def test_bad_penalties():
    with pytest.raises(ValueError, match="a single real number, got float64 of shape"):
        kfax.Penalty(F)
    with pytest.raises(ValueError, match="penalties only"):
        objective([kfax.Penalty(1.0)])
    with pytest.raises(ValueError, match="penalties only"):
        objective(kfax.Penalty(1.0))


def test_the_number_of_what_a_loss_fn_returns():
    outputs = jax.random.normal(jax.random.key(0), (5, 3))
    loss, penalty = kfax.squared_error(outputs, jnp.zeros((5, 3))), kfax.Penalty(0.25)
    number = jnp.mean(jnp.sum(outputs**2, axis=1))
    for returned, expected in (
        (loss, number),
        (penalty, 0.25),
        ([loss, 2 * penalty], number + 0.5),
        ({"a": loss, "b": [3 * loss]}, 4 * number),
        ((loss, {"accuracy": 1.0}), number),
        (([loss, penalty], "state", "aux"), number + 0.25),
    ):
        assert_close(kfax.value(returned), jnp.asarray(expected))
    gradient = jax.grad(lambda f: kfax.value([kfax.squared_error(f, 0 * f), penalty]))(outputs)
    assert_close(gradient, 2 * outputs / 5)


@pytest.mark.parametrize("wrong", [1.0, (), [], jnp.ones(3), "loss"])
def test_what_is_no_loss_has_no_number(wrong):
    loss = kfax.squared_error(jnp.ones((5, 3)), jnp.zeros((5, 3)))
    for returned in (wrong, (wrong, loss), (loss, loss)):
        with pytest.raises(ValueError, match=r"`kfax\.value` takes what a `loss_fn` returns"):
            kfax.value(returned)

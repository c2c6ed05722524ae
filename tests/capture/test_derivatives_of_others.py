"""Models whose derivatives are taken by another function than JAX's backward pass: what kfax says of them."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import kfax


N, D = 6, 3
X = jax.random.normal(jax.random.key(1), (N, D))


def loss_fn(model, x):
    return kfax.squared_error(jax.vmap(model)(x), x)


class Flow(eqx.Module):
    """A differential equation solved with an adjoint."""

    field: eqx.nn.MLP
    adjoint: diffrax.AbstractAdjoint
    by_arguments: bool = eqx.field(static=True, default=False)

    def __call__(self, x):
        term = diffrax.ODETerm(lambda t, y, args: (args if self.by_arguments else self.field)(y))
        args = self.field if self.by_arguments else None
        solver = diffrax.Euler()
        solution = diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.5, x, args=args, adjoint=self.adjoint, max_steps=4)
        assert solution.ys is not None
        return solution.ys[-1]


def flow(key, adjoint, by_arguments=False):
    return Flow(eqx.nn.MLP(D, D, 4, 1, jnp.tanh, key=key), adjoint, by_arguments)


@eqx.filter_custom_vjp
def reversibly(arguments):
    layer, x = arguments
    return layer(x)


@reversibly.def_fwd
def _forward(perturbed, arguments):
    return reversibly(arguments), None


@reversibly.def_bwd
def _backward(residuals, cotangent, perturbed, arguments):
    return eqx.filter_vjp(lambda a: a[0](a[1]), arguments)[1](cotangent)[0]


class Reversible(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, x):
        return reversibly((self.layer, x))


def reversible(key):
    return Reversible(eqx.nn.Linear(D, D, key=key))


@pytest.mark.parametrize(
    "make", [reversible, lambda key: flow(key, diffrax.BacksolveAdjoint(), True)], ids=["reversible", "backsolve"]
)
def test_a_layer_called_by_a_custom_rule(key, make):
    model = make(key)
    with pytest.raises(ValueError, match=r"ayer.* is called by a `jax\.custom_vjp` function.*`kfax\.TaggedModule`"):
        kfax.check(loss_fn, kfax.tag(model), X)
    kfax.check(loss_fn, kfax.TaggedModule(model, block=kfax.Full()), X)


def test_a_backward_pass_with_a_while_loop(key):
    """That of diffrax's default adjoint: it can be run, but not differentiated again."""
    model = kfax.tag(flow(key, diffrax.RecursiveCheckpointAdjoint()))
    kfax.check(loss_fn, model, X)
    optimizer = kfax.full_batch(loss_fn)
    state = optimizer.init(model, X)
    with pytest.raises(ValueError, match=r"`kfax\.QuadraticModel`.*has a `while_loop`.*`diffrax\.DirectAdjoint\(\)`"):
        eqx.filter_jit(optimizer.step)(model, state, X, key=key)
    exact = kfax.ImplicitExactCurvature()
    state = exact.update(exact.init(model), loss_fn, model, X)
    with pytest.raises(ValueError, match=r"has a `while_loop`"):
        exact.multiply(state, kfax.parameters_of(model))


def test_what_is_said_to_work_with_a_while_loop_does(key):
    direct = kfax.tag(flow(key, diffrax.DirectAdjoint()))
    default = kfax.tag(flow(key, diffrax.RecursiveCheckpointAdjoint()))
    for model, optimizer in (
        (direct, kfax.full_batch(loss_fn)),
        (default, kfax.stochastic(loss_fn, learning_rate=0.1)),
    ):
        state = optimizer.init(model, X)
        _, _, info = eqx.filter_jit(optimizer.step)(model, state, X, key=key)
        assert info.result == kfax.StepResult.successful

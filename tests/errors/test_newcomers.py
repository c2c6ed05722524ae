"""What newcomers met after their first mistakes: numbers out of range, objects of the wrong type, derivatives."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from error_cases import optimizer
from helpers import assert_close

import kfax


def test_what_a_second_newcomer_met(case):
    """Each had an error of Python's or JAX's, or none."""

    class Negative(kfax.FixedDamping):
        def value(self, stored, step):
            return -stored

    with pytest.raises(ValueError, match="`damping` must be positive and finite, got -1"):
        optimizer(case.loss_fn, damping=Negative(jnp.asarray(1.0))).init(case.model, case.batch)
    with pytest.raises(ValueError, match="`weights` of `softmax_cross_entropy` must be finite"):
        kfax.softmax_cross_entropy(jnp.ones((3, 2)), jnp.zeros(3, int), weights=jnp.array([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match=r"`kfax.Dense` takes a matrix, got a weight of shape \(4,\)"):
        kfax.Dense(jnp.ones(4)).shape()
    link = kfax.scale_by_curvature(case.loss_fn, damping=1.0)
    gradients = eqx.filter(case.model, eqx.is_inexact_array)
    with pytest.raises(ValueError, match="needs to see model and batch"):
        link.update(gradients, link.init(gradients), model=case.model)
    with pytest.raises(IndexError) as caught:
        kfax.function_loss(lambda f: jnp.mean(f, axis=1), jnp.ones((4, 3)))
    assert any("called for one place, here with outputs of shape (3,)" in note for note in caught.value.__notes__)
    loss = case.loss_fn(case.model, case.batch)
    assert_close((loss / 4).value(), loss.value() / 4)


def test_other_numbers_that_are_not_positive_get_no_advice_about_damping():
    for make in (lambda: kfax.NormConstraint(0.1, 0.0), lambda: kfax.DampingMultiple(0.0)):
        with pytest.raises(ValueError, match=r"must be positive and finite, got 0.0\.$"):
            make()


def test_a_loss_is_multiplied_by_one_number_that_is_not_negative(case):
    loss = case.loss_fn(case.model, case.batch)
    assert (jnp.asarray(2.0) * loss).value() == 2 * loss.value() == (loss * 2).value()
    assert_close(eqx.filter_jit(lambda c: (c * loss).value())(0.5), 0.5 * loss.value())
    with pytest.raises(ValueError, match="not negative, got -1: .* `kfax.Penalty`"):
        (lambda: -1 * loss)()
    with pytest.raises(ValueError, match=r"not by an array of shape \(3,\): .*`weights=`"):
        (lambda: jnp.ones(3) * loss)()


def test_a_power_of_the_dense_matrix_has_one_damping(case):
    power = kfax.Preconditioner(kfax.ExplicitExactCurvature(), exponent=-0.5)
    l2 = kfax.L2(0.1, lambda model: model.layers[0].weight)
    with pytest.raises(ValueError, match="give `l2` a number"):
        optimizer(case.loss_fn, preconditioner=power, l2=l2)


def test_a_random_source_without_a_key(case):
    for source in (kfax.SampledFisher(), kfax.CurvaturePropagation()):
        k = optimizer(case.loss_fn, preconditioner=kfax.Preconditioner(kfax.BlockDiagonalCurvature(source)))
        with pytest.raises(ValueError, match=r"pass `key=jax\.random\.key.*ExactGGN"):
            k.step(case.model, k.init(case.model, case.batch), case.batch)


def test_a_dense_layer_that_is_not_mapped(case):
    inputs, labels = case.batch
    with pytest.raises(ValueError, match=rf"shape \({inputs.shape[1]},\).*{inputs.shape}.*`jax\.vmap\(model\)"):
        case.model(inputs)
    scalar = kfax.tag(eqx.nn.Linear("scalar", 2, key=jax.random.key(0)))
    assert scalar(jnp.ones(())).shape == (2,)
    with pytest.raises(ValueError, match=r"shape \(\).*\(1,\)"):
        scalar(jnp.ones(1))
    stack = eqx.filter_vmap(lambda key: kfax.tag(eqx.nn.Linear(8, 3, key=key)))(jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"a stack of `equinox\.nn\.Linear`.*`equinox\.filter_vmap` too"):
        stack(inputs[0])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"learning_rate": -0.1}, r"`learning_rate` must not be negative or infinite, got -0\.1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must not be negative or infinite, got nan"),
        ({"momentum": 1.5}, r"`momentum` must be in \[0, 1\], got 1\.5"),
        ({"momentum": -0.5}, r"`momentum` must be in \[0, 1\]"),
        ({"learning_rate": kfax.QuadraticModel}, r"not a class: write `kfax\.QuadraticModel\(\.\.\.\)`"),
        ({"damping": kfax.LevenbergMarquardt}, r"not a class: write `kfax\.LevenbergMarquardt\(\.\.\.\)`"),
    ],
)
def test_coefficients_out_of_range(case, settings, match):
    with pytest.raises(ValueError, match=match):
        optimizer(case.loss_fn, **settings)
    with pytest.raises(ValueError, match="`learning_rate` must not be negative"):
        kfax.NormConstraint(-0.1, 1e-3)


@pytest.mark.parametrize(
    "where",
    [
        lambda model: jax.tree.map(lambda leaf: eqx.is_array(leaf) and leaf.ndim > 1, model),
        lambda model: [],
        lambda model: model.layers[0],
    ],
    ids=["booleans", "nothing", "frozen"],
)
def test_l2_of_nothing(case, where):
    optim = optimizer(case.loss_fn, l2=kfax.L2(0.1, where), frozen=lambda model: model.layers[0])
    with pytest.raises(ValueError, match=r"`where` of `kfax\.L2` must return nodes.*\(no mask of booleans\)"):
        optim.init(case.model, case.batch)


def test_parameters_of_loss_fn_that_are_not_known(case):
    with pytest.raises(ValueError, match=r"parameter `rng`, which kfax does not know.*`key` and `model_state`"):
        optimizer(lambda model, batch, rng: case.loss_fn(model, batch)).init(case.model, case.batch)
    fine = optimizer(lambda model, batch, *rest, scale=2.0, **more: scale * case.loss_fn(model, batch))
    fine.init(case.model, case.batch)


def test_an_empty_batch(case):
    with pytest.raises(ValueError, match="The batch is empty"):
        optimizer(case.loss_fn).init(case.model, jax.tree.map(lambda x: x[:0], case.batch))


def test_a_step_can_be_printed(case):
    optim = optimizer(case.loss_fn)
    step = eqx.filter_jit(optim.step)
    info = step(case.model, optim.init(case.model, case.batch), case.batch, key=jax.random.key(0))[2]
    assert str(info).startswith(f"step 0: loss {float(info.loss):.4g}, gradient_norm ")
    assert str(info).endswith("damping 1, reduction_ratio nan. The step was taken.")
    several = jax.tree.map(lambda x: jnp.stack([x, x]), info)
    assert str(several) == repr(several)


def test_a_loss_where_a_number_is_needed(case):
    loss = case.loss_fn(case.model, case.batch)
    with pytest.raises(TypeError, match=r"(?s)scalar-output.*a kfax Loss; the number is its `value\(\)`"):
        eqx.filter_grad(case.loss_fn)(case.model, case.batch)
    for add in (lambda: loss + 0.1, lambda: 0.1 + loss, lambda: loss + loss, lambda: sum([loss, loss])):
        with pytest.raises(TypeError, match=r"a list of losses.*`kfax\.Penalty\(value\)`.*`l2=`"):
            add()


def test_periods_and_decays_out_of_range(case):
    with pytest.raises(ValueError, match="`inverse_update_period` must be a whole number, at least 1"):
        kfax.Preconditioner(inverse_update_period=0)
    with pytest.raises(ValueError, match="`curvature_update_period` must be a whole number, at least 1"):
        kfax.Preconditioner(curvature_update_period=0)
    with pytest.raises(ValueError, match="`period`.*at least 1"):
        kfax.LevenbergMarquardt(1.0, period=0)
    for make in (lambda v: kfax.LevenbergMarquardt(1.0, decay=v), lambda v: kfax.BlockDiagonalCurvature(decay=v)):
        for value in (0.0, 1.5):
            with pytest.raises(ValueError, match=r"`decay` must be in \(0, 1\]"):
                make(value)
    for source in (kfax.SampledFisher, kfax.CurvaturePropagation):
        with pytest.raises(ValueError, match="`num_samples` must be a whole number, at least 1, got 0"):
            source(0)


def test_frozen_must_select_nodes_of_the_model(case):
    for where in (lambda m: m.layers[0].weight + 1, lambda m: []):
        with pytest.raises(ValueError, match=r"`frozen` must return nodes of the model"):
            kfax.coverage(case.model, frozen=where)
    with pytest.raises(ValueError, match=r"`where` of `kfax\.L2`"):
        k = optimizer(case.loss_fn, l2=kfax.L2(0.1, lambda m: m.layers[0].weight * 2))
        k.step(case.model, k.init(case.model, case.batch), case.batch, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no parameter to train"):
        kfax.tag(case.model, frozen=lambda m: m)


def test_an_axis_that_has_no_such_name(case):
    def unnamed(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    k = optimizer(unnamed, preconditioner=kfax.Preconditioner(kfax.BlockDiagonalCurvature(example_axis="batch")))
    with pytest.raises(ValueError, match=r"no axis is named 'batch'.*leave `example_axis` out"):
        k.init(case.model, case.batch)


def _gradient(model, x):
    return jnp.sum(jax.grad(lambda z: model(z)[0])(x) ** 2)


def _laplacian(model, x):
    return jnp.trace(jax.hessian(lambda z: model(z)[0])(x))


@pytest.mark.parametrize("rematerialized", [False, True])
@pytest.mark.parametrize("derivative", [_gradient, _laplacian])
def test_losses_with_derivatives_in_reverse_mode(derivative, rematerialized, case):
    if rematerialized:
        derivative = eqx.filter_checkpoint(derivative)

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(lambda x: derivative(model, x))(batch[0]), jnp.zeros(6))

    message = (
        r"`loss_fn` differentiates the layer at `\.layers\[\d\]`(?s:.*)jax\.jacfwd(?s:.*)kfax\.untag(?s:.*)Implicit"
    )
    with pytest.raises(ValueError, match=message):
        optimizer(loss_fn).init(case.model, case.batch)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    with pytest.raises(eqx.EquinoxRuntimeError, match=message):
        state = eqx.filter_jit(estimator.update)(estimator.init(case.model), loss_fn, case.model, case.batch)
        jax.block_until_ready(jax.tree.leaves(state))


def test_derivatives_of_which_only_the_value_matters(case):
    """An adversarial example, made as the message says."""

    def attack(model, x):
        model = kfax.untag(model)
        return x + 0.1 * jax.lax.stop_gradient(jnp.sign(jax.grad(lambda z: model(z)[0])(x)))

    def loss_fn(model, batch):
        return kfax.softmax_cross_entropy(jax.vmap(lambda x: model(attack(model, x)))(batch[0]), batch[1])

    kfax.check(loss_fn, case.model, case.batch)
    moved = jax.vmap(lambda x: attack(case.model, x))(case.x)
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
    within = estimator.update(estimator.init(case.model), loss_fn, case.model, case.batch)
    before = estimator.update(estimator.init(case.model), case.loss_fn, case.model, (moved, case.y))
    for found, expected in zip(jax.tree.leaves(within), jax.tree.leaves(before), strict=True):
        assert jnp.allclose(found, expected, rtol=1e-12)


MISTAKES = """
import equinox as eqx, jax, jax.numpy as jnp, kfax
linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
model, batch = kfax.tag(linear), (jnp.ones((4, 2)), jnp.ones((4, 3)))
settings = {"learning_rate": 0.1, "momentum": 0.9, "damping": 1.0}
def optimizer(loss_fn=lambda model, batch: None, **options):
    return kfax.Optimizer(loss_fn, **(settings | options))
optim = optimizer(lambda model, batch: kfax.squared_error(jax.vmap(model)(batch[0]), batch[1]))
state = optim.init(model, batch)
exact = kfax.ExplicitExactCurvature()
spectrum = exact.decompose(exact.init(model), kfax.parameters_of(model))
mistakes = {
    "`learning_rate` must be a number, or a schedule": lambda: optimizer(learning_rate="0.1"),
    "`block` of `kfax.tag` must be one block": lambda: kfax.tag(linear, block=kfax.Diagonal),
    "For other blocks in single layers see `kfax.set_block`": lambda: kfax.tag(linear, block={"": kfax.Diagonal()}),
    "`momentum` must be a number": lambda: optimizer(momentum=None),
    "`damping` must be a single number, got an array of shape (2,)": lambda: optimizer(damping=jnp.ones(2)),
    "`loss_fn` must be a function of model and batch, got float": lambda: optimizer(1.0),
    "takes the class of a module": lambda: kfax.default_registry.register(linear, kfax.TaggedLinear),
    "wraps an `equinox.nn.Linear`, got LayerNorm": lambda: kfax.TaggedLinear(eqx.nn.LayerNorm(3)),
    "`block` must be a block, such as `kfax.KroneckerFactored()`": lambda: kfax.TaggedLinear(linear, block="kfac"),
    "`sharing` must be `kfax.Expand()` or `kfax.Reduce()`": lambda: kfax.KroneckerFactored("reduce"),
    "`inversion` must be `kfax.Cholesky()` or `kfax.Eigh()`, got 'eigh'": lambda: kfax.Full(inversion="eigh"),
    "`inversion` must be `kfax.Cholesky()`": lambda: kfax.KroneckerFactored(inversion=None),
    "`source` must be a curvature source, or `kfax.Hessian()`": lambda: kfax.ImplicitExactCurvature(None),
    "`mesh` must be a mesh of devices": lambda: kfax.Placement("data"),
    "`placement` must be a `kfax.Placement(mesh)`": lambda: kfax.BlockDiagonalCurvature(placement="data"),
    "takes a `kfax.BlockDiagonalCurvature(...)` and a `kfax.Placement(": lambda: kfax.PlacedCurvature(None, None),
    "`source` must be a curvature source, such as `kfax.ExactGGN()`": lambda: kfax.BlockDiagonalCurvature("ggn"),
    "as an array of real floating-point numbers, got float": lambda: kfax.squared_error(1.0, 2.0),
    "`estimator` must be an estimator, such as": lambda: kfax.Influence(optim.loss_fn, kfax.ExactGGN()),
    "`preconditioner` must be an estimator": lambda: kfax.ConjugateGradients(preconditioner=kfax.KroneckerFactored()),
    "`directions` must be a PyTree like": lambda: kfax.Influence(optim.loss_fn, kfax.BlockDiagonalCurvature()).scores(
        model, batch, kfax.parameters_of(model)
    ),
    "`spectrum` must be an eigendecomposition": lambda: kfax.Laplace(model, kfax.ExplicitExactCurvature(), 4, 1.0),
    "`spectrum` is not that of the parameters": lambda: kfax.Laplace(model, spectrum, 4, 1.0, frozen=lambda m: m.bias),
    "`prior_precision` must be positive": lambda: kfax.Laplace(model, spectrum, 4, 0.0),
    "`temperature` must be a single number": lambda: kfax.Laplace(model, spectrum, 4, 1.0, temperature=jnp.ones(2)),
    "`function` must return an array": lambda: kfax.Laplace(model, spectrum, 4, 1.0).predict(lambda model: None),
    "`function` must be a function of the model": lambda: kfax.Laplace(model, spectrum, 4, 1.0).predict(batch[0]),
    "this is of several examples": lambda: kfax.Predictive(jnp.ones((4, 2)), jnp.ones((4, 2, 2))).variance(),
    "`rule` must be a function": lambda: kfax.default_registry.register(eqx.nn.Linear, kfax.Full()),
    "`axis_name` must be the name of a mesh axis": lambda: kfax.across(lambda model, batch: None, 0),
    "`check_loss` takes a `kfax.Loss`, got Penalty": lambda: kfax.check_loss(kfax.Penalty(1.0), key=jax.random.key(0)),
    "takes a module and one boolean, got TaggedLinear": lambda: kfax.masked(True, model),
    "`frozen` must be a function of the model, as in": lambda: kfax.tag(linear, frozen=".weight"),
    "must be a single JAX key, such as `jax.random.key(0)`, got 0": lambda: optim.step(model, state, batch, key=0),
    "must be a single JAX key": lambda: optim.step(model, state, batch, key=jax.random.split(jax.random.key(0), 3)),
    "got TaggedLinear. Were the arguments of `step(": lambda: optim.step(state, model, batch, key=jax.random.key(0)),
}
for message, make in mistakes.items():
    try:
        make()
    except ValueError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"no error: {message}")
print(len(mistakes), "mistakes")
"""


def test_objects_of_the_wrong_type():
    """In a process of its own, without the run-time type checker, as a user has it."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", MISTAKES], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "36 mistakes\n"

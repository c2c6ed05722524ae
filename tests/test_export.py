"""Programs for accelerators, made without having one: what stands in the StableHLO of steps and of their parts.

The numbers of the models are float32, while the tests run with float64 enabled.
"""

import collections
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import grid

import kfax


KEY = jax.random.key(0)
# A product of matrices: its precision, if any is given, and its types.
DOT = re.compile(r"stablehlo\.dot_general [^\n]*?(?:precision = \[(\w+), \w+\][^\n]*?)?: (\([^\n]*?\) -> tensor<\S+>)")


def loss_fn(model, batch):
    inputs, labels = batch
    # Marks the model's own products, forward and backward: nothing in kfax asks for `HIGH`.
    with jax.default_matmul_precision("high"):
        outputs = jax.vmap(model)(inputs)
    return kfax.softmax_cross_entropy(outputs, labels)


def squared_loss_fn(model, batch):
    """With a Hessian that is diagonalized."""
    inputs, labels = batch
    with jax.default_matmul_precision("high"):
        outputs = jax.vmap(model)(inputs)
    return kfax.function_loss(lambda f, y: jnp.sum(jnp.logaddexp(f, -f) * (1 + y)), outputs, labels)


def dense(block=None):
    keys = jax.random.split(KEY, 2)
    layers = [
        eqx.nn.Linear(5, 7, dtype=jnp.float32, key=keys[0]),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.Linear(7, 6, dtype=jnp.float32, key=keys[1]),
        eqx.nn.LayerNorm(6, dtype=jnp.float32),
    ]
    model = kfax.tag(eqx.nn.Sequential(layers))
    model = model if block is None else kfax.set_block(model, lambda m: (m.layers[0], m.layers[2]), block)
    return model, (jnp.ones((8, 5), jnp.float32), jnp.zeros(8, int))


def convolutional(block):
    layers = [
        eqx.nn.Conv2d(3, 4, 3, padding=1, dtype=jnp.float32, key=KEY),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.Conv2d(4, 6, 3, stride=2, dtype=jnp.float32, key=KEY),
        eqx.nn.Lambda(lambda x: x.sum((1, 2))),
    ]
    model = kfax.set_block(kfax.tag(eqx.nn.Sequential(layers)), lambda m: (m.layers[0], m.layers[2]), block)
    return model, (jnp.ones((4, 3, 8, 8), jnp.float32), jnp.zeros(4, int))


class Tied(eqx.Module):
    """An embedding whose matrix is that of the output head as well: its block is a `KroneckerSum`."""

    shared: eqx.nn.Shared

    def __init__(self):
        embedding = eqx.nn.Embedding(6, 4, dtype=jnp.float32, key=KEY)
        head = eqx.nn.Linear(4, 6, use_bias=False, dtype=jnp.float32, key=KEY)
        self.shared = eqx.nn.Shared((embedding, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    def __call__(self, word):
        embedding, head = self.shared()
        return head(jnp.tanh(embedding(word)))


def tied():
    return kfax.tag(Tied()), (jnp.zeros(8, int), jnp.zeros(8, int))


def full_batch(**options):
    return kfax.full_batch(options.pop("loss_fn", loss_fn), **options)


def fixed(estimator=None, **options):
    preconditioner = kfax.Preconditioner(estimator, **options)
    return kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.9, damping=0.1, preconditioner=preconditioner)


BLOCKS = {
    f"{name} {type(inversion).__name__}": make(inversion)
    for inversion in (kfax.Cholesky(), kfax.Eigh())
    for name, make in {
        "expand": lambda inversion: kfax.KroneckerFactored(inversion=inversion),
        "reduce": lambda inversion: kfax.KroneckerFactored(kfax.Reduce(), inversion=inversion),
        "tensor": lambda inversion: kfax.TensorNormal(inversion=inversion),
        "likeliest": lambda inversion: kfax.KLOptimal(inversion=inversion),
        "unit-wise": lambda inversion: kfax.UnitWise(inversion=inversion),
        "full": lambda inversion: kfax.Full(inversion=inversion),
    }.items()
} | {"diagonal": kfax.Diagonal(), "scaled": kfax.ScaledIdentity()}

# By name: makes an optimizer, and a model with a batch.
STEPS = {name: (full_batch, lambda block=block: dense(block)) for name, block in BLOCKS.items()} | {
    "sum": (full_batch, tied),
    "convolution expand": (full_batch, lambda: convolutional(kfax.KroneckerFactored())),
    "convolution reduce": (full_batch, lambda: convolutional(kfax.KroneckerFactored(kfax.Reduce()))),
    "convolution tensor": (full_batch, lambda: convolutional(kfax.TensorNormal())),
    "staggered": (lambda: fixed(inverse_update_period=kfax.Staggered(10)), dense),
    "stochastic": (lambda: kfax.stochastic(loss_fn, learning_rate=0.1), dense),
    "explicit Cholesky": (lambda: fixed(kfax.ExplicitExactCurvature()), dense),
    "explicit Eigh": (lambda: fixed(kfax.ExplicitExactCurvature(inversion=kfax.Eigh())), dense),
    "power": (lambda: fixed(exponent=-0.5), dense),
    "function loss": (lambda: full_batch(loss_fn=squared_loss_fn), lambda: with_targets(*dense())),
}


def with_targets(model, batch):
    return model, (batch[0], jnp.ones((8, 6), jnp.float32))


def program(function, *args, platform="cuda"):
    """The text of the program of a function of arguments, some of them described only, that may hold anything."""
    arrays, rest = eqx.partition(args, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))

    def run(arrays):
        return jax.tree.leaves(eqx.filter(function(*eqx.combine(arrays, rest)), eqx.is_array))

    return jax.export.export(jax.jit(run), platforms=[platform])(arrays).mlir_module()


def step_program(name, platform="cuda"):
    make_optimizer, make_model = STEPS[name]
    optimizer, (model, batch) = make_optimizer(), make_model()
    state = eqx.filter_eval_shape(lambda m, b: optimizer.init(m, b, key=KEY), model, batch)
    return program(lambda m, s, b, k: optimizer.step(m, s, b, key=k), model, state, batch, KEY, platform=platform)


def products(text):
    """How often each product of matrices occurs: its precision, and its types."""
    return collections.Counter((precision or "DEFAULT", types) for precision, types in DOT.findall(text))


def precisions(text):
    return {precision for precision, _ in products(text)}


def without_draws(text):
    """Less the functions that draw random numbers: JAX draws those of float64 where it is enabled."""
    functions = re.split(r"(?=\n  func\.func )", text)
    return "".join(f for f in functions if not re.match(r"\n  func\.func private @_(uniform|bernoulli|rademacher)", f))


@grid(thin=2, name=STEPS, platform=["cuda", "tpu"])
def test_a_step_stays_on_the_device_and_in_float32(name, platform):
    text = step_program(name, platform)
    targets = re.findall(r"custom_call @([\w.]+)", text)
    assert not [t for t in targets if re.search("python|callback|host", t, re.IGNORECASE)], targets
    assert not re.search(r"stablehlo\.(send|recv|infeed|outfeed)", text)
    # Numbers that the user gave, such as λ, are float64, and so is the quadratic model in the plane of two directions.
    arrays = set(re.findall(r"tensor<((?:\d+x)+)f64>", without_draws(text)))
    assert not [shape for shape in arrays if math.prod(map(int, shape.split("x")[:-1])) > 4]


@pytest.mark.parametrize("name", ["expand Cholesky", "tensor Eigh", "sum", "staggered", "explicit Eigh", "power"])
def test_without_float64_there_is_none(name):
    with jax.enable_x64(False):
        assert "f64" not in step_program(name)


@grid(thin=2, name=STEPS)
def test_all_but_statistics_is_at_full_precision(name):
    """The rest is the model's own or of the statistics, which follow the user's `jax_default_matmul_precision`."""
    make_optimizer, make_model = STEPS[name]
    estimator, (model, batch) = make_optimizer().preconditioner.estimator, make_model()
    loss = squared_loss_fn if name == "function loss" else loss_fn
    state = eqx.filter_eval_shape(estimator.init, model)
    update = lambda s, m, b, k: estimator.update(s, loss, m, b, key=k)  # noqa: E731
    arguments = (state, model, batch, KEY)
    statistics = products(program(update, *arguments))
    rest = products(step_program(name)) - statistics
    assert {precision for precision, _ in rest} <= {"HIGHEST", "HIGH"}
    with jax.default_matmul_precision("highest"):
        assert precisions(program(update, *arguments)) <= {"HIGHEST", "HIGH"}


@grid(thin=2, name=[name for name in STEPS if name != "function loss"])
def test_whatever_is_solved_is_at_full_precision(name):
    make_optimizer, make_model = STEPS[name]
    estimator, (model, _) = make_optimizer().preconditioner.estimator, make_model()
    state, parameters = eqx.filter_eval_shape(estimator.init, model), kfax.parameters_of(model)
    functions = {
        "refresh": lambda s, v: estimator.refresh(s, v, 0.1),
        "redamp": lambda s, v: estimator.redamp(s, v, 0.1),
        "solve": estimator.solve,
        "multiply": estimator.multiply,
        "power": lambda s, v: estimator.power(s, v, -0.5, 0.1),
        "diagonal": estimator.diagonal,
        "eigenvalues": estimator.eigenvalues,
    }
    with jax.default_matmul_precision("bfloat16"):
        for what, function in functions.items():
            assert precisions(program(function, state, parameters)) <= {"HIGHEST"}, what


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_implicit_products_stay_on_the_device(platform):
    """Not so `solve`, which reports by a callback that an iterative solver did not converge."""
    estimator, (model, batch) = kfax.ImplicitExactCurvature(), dense()
    parameters = kfax.parameters_of(model)

    def multiply(model, batch, vector):
        state = estimator.update(estimator.init(model), loss_fn, model, batch)
        return estimator.multiply(state, vector)

    text = program(multiply, model, batch, parameters, platform=platform)
    assert "callback" not in text and not re.search(r"tensor<(?:\d+x)+f64>", text)
    assert precisions(text) <= {"HIGHEST", "HIGH"}

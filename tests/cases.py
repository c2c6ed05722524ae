"""The table of cases from which the other files are parametrized. A new layer, block or loss is one more row."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import reference
from helpers import mlp

import kfax


@dataclasses.dataclass(frozen=True)
class LossCase:
    """A loss of kfax and the same of one example, written out; and which of its curvature is known."""

    name: str
    make: Callable
    one: Callable
    targets: Callable  # (key, shape of outputs) -> targets
    has_ggn: bool = True
    has_fisher: bool = True
    has_samples: bool = True


def _labels(key, shape):
    return jax.random.randint(key, shape[:-1], 0, shape[-1])


def _real(key, shape):
    return jax.random.normal(key, shape)


# The losses with which layers, blocks and estimators are tested.
LOSSES = {
    case.name: case
    for case in [
        LossCase("softmax", kfax.softmax_cross_entropy, reference.softmax_loss, _labels),
        LossCase("sigmoid", kfax.sigmoid_cross_entropy, reference.sigmoid_loss, lambda k, s: jax.random.uniform(k, s)),
        LossCase("squared", kfax.squared_error, reference.squared_loss, _real),
    ]
}


def _gaussian_nll(outputs, targets, **options):
    means, log_variances = jnp.split(outputs, 2, axis=-1)
    return kfax.gaussian_nll(means, log_variances, targets, **options)


def _function_softmax(outputs, labels, **options):
    def sample(key, f):
        return jax.random.categorical(key, f)

    return kfax.function_loss(reference.softmax_loss, outputs, labels, sample=sample, **options)


def _function_quartic(outputs, targets, **options):
    return kfax.function_loss(reference.quartic_loss, outputs, targets, **options)


# The same and all others, for the tests of losses and sources.
ALL_LOSSES = LOSSES | {
    case.name: case
    for case in [
        LossCase("poisson", kfax.poisson_nll, reference.poisson_loss, lambda k, s: 1.0 * jax.random.poisson(k, 2.0, s)),
        LossCase(
            "gaussian_nll",
            _gaussian_nll,
            reference.gaussian_nll_loss,
            lambda k, s: _real(k, (*s[:-1], s[-1] // 2)),
            has_ggn=False,
        ),
        LossCase("function-softmax", _function_softmax, reference.softmax_loss, _labels, has_fisher=False),
        LossCase(
            "function-quartic", _function_quartic, reference.quartic_loss, _real, has_fisher=False, has_samples=False
        ),
    ]
}


class Attention(eqx.Module):
    """Self-attention over the positions of one example, pooled."""

    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key, use_bias):
        k1, k2 = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(
            2,
            4,
            use_query_bias=use_bias,
            use_key_bias=use_bias,
            use_value_bias=use_bias,
            use_output_bias=use_bias,
            key=k1,
        )
        self.head = eqx.nn.Linear(4, 3, use_bias=use_bias, key=k2)

    def __call__(self, x):
        x = x.reshape(-1, 4)
        return self.head(jnp.mean(jnp.tanh(self.attention(x, x, x)), axis=0))


class Residual(eqx.Module):
    """A dense layer used twice, between two others."""

    first: eqx.nn.Linear
    middle: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key, use_bias):
        k1, k2, k3 = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(8, 4, use_bias=use_bias, key=k1)
        self.middle = eqx.nn.Linear(4, 4, use_bias=use_bias, key=k2)
        self.last = eqx.nn.Linear(4, 3, use_bias=use_bias, key=k3)

    def __call__(self, x):
        h = jnp.tanh(self.first(x))
        h = h + jnp.tanh(self.middle(h))
        h = h + jnp.tanh(self.middle(h))
        return self.last(h)


def scanned_mlp(key, use_bias):
    return eqx.nn.MLP(8, 3, 5, 3, activation=jnp.tanh, use_bias=use_bias, use_final_bias=use_bias, scan=True, key=key)


# Models from 8 inputs to 3 outputs, with tanh where it matters, for `(key, use_bias)`.
MODELS: dict[str, Callable[[Any, bool], Any]] = {
    "mlp": lambda key, bias: mlp(key, (8, 5, 4, 3), use_bias=bias),
    "mlp-scan": scanned_mlp,
    "attention": Attention,
    "reused": Residual,
}
# Those in which each layer is used once for each example.
UNSHARED = ("mlp", "mlp-scan")


@dataclasses.dataclass(frozen=True)
class Case:
    """A tagged model with data, ready to be run."""

    model: Any
    loss_fn: Callable
    one: Callable
    x: jax.Array
    y: jax.Array

    @property
    def batch(self):
        return self.x, self.y

    def outputs(self, parameters):
        """The outputs as a function of the parameters, without kfax."""
        model = eqx.combine(parameters, eqx.filter(self.model, eqx.is_inexact_array, inverse=True))
        return jax.vmap(kfax.untag(model))(self.x)


def make_case(model: Any = "mlp", loss="softmax", use_bias=True, num_examples=6, sharing=None, seed=0, **options):
    keys = jax.random.split(jax.random.key(seed), 3)
    block = kfax.KroneckerFactored(sharing or kfax.Expand())
    registry = kfax.default_registry.register(eqx.nn.Linear, lambda m: kfax.TaggedLinear(m, block=block))
    network = MODELS[model](keys[0], use_bias) if isinstance(model, str) else model
    tagged = kfax.tag(network, registry=registry)
    row = LOSSES[loss]
    x = jax.random.normal(keys[1], (num_examples, 8))
    shape = jax.eval_shape(jax.vmap(kfax.untag(tagged)), x).shape
    y = row.targets(keys[2], shape)

    def loss_fn(model, batch):
        x, y = batch
        return row.make(jax.vmap(model, axis_name="batch")(x), y, **options)

    return Case(tagged, loss_fn, row.one, x, y)


def grid(slow=lambda *row: False, thin=1, **axes):
    """`pytest.mark.parametrize` over the product of the given axes, with readable ids; some rows may be slow.

    With `thin=k` one row in k is not: those whose places along the axes add up to a multiple of k, so that every value
    of an axis with others to go with occurs.
    """

    def parameter(places, row):
        is_slow = slow(*row) or sum(places) % thin
        marks = [pytest.mark.combination, *([pytest.mark.slow] if is_slow else [])]
        return pytest.param(*row, id="-".join(name_of(value) for value in row), marks=marks)

    values = [list(axis) for axis in axes.values()]
    places = itertools.product(*(range(len(axis)) for axis in values))
    rows = zip(places, itertools.product(*values), strict=True)
    return pytest.mark.parametrize(",".join(axes), [parameter(*row) for row in rows])


def name_of(value):
    """For ids, which must be the same in every process."""
    return getattr(value, "__name__", str(value))

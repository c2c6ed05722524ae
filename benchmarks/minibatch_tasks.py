"""What `minibatch.py` trains: five small models with their data, of which batches are drawn at random."""

import functools
import pathlib
import pydoc_data.topics
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

import kfax


sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import transformer  # noqa: E402


IMAGE_SIZE, TRAIN_SIZE, TEST_SIZE = 16, 2**15, 2048


class Task:
    """A model with data.

    `steps` is the budget of all methods, `period` how many of them are between two evaluations, `size` the number of
    training examples. Examples are mapped over the axis "batch". `is_scanned` says whether the steps between two
    evaluations are one program: within a loop, XLA's convolutions take many times as long on a CPU.
    """

    name: str
    steps: int
    period: int
    batch_size: int
    size: int
    train_set: tuple
    test_set: object
    is_scanned = True

    def init(self, key):
        """The model and its state, which may be empty."""
        return kfax.tag(self.model(key)), ()

    def batch(self, indices):
        """Of training examples."""
        return jax.tree.map(lambda x: x[indices], self.train_set)

    def held_out_loss(self, model, model_state, test_set):
        """What methods are compared by."""
        return self.loss_fn(eqx.nn.inference_mode(model), test_set, model_state)[0].value()

    def model(self, key):
        raise NotImplementedError

    def loss_fn(self, model, batch, model_state):
        """The loss, and the next state of the model."""
        raise NotImplementedError

    def head(self, model):
        """The weight that makes the outputs."""
        raise NotImplementedError


def distorted(key, image):
    """A digit of 8x8 on 16x16 pixels: turned, sheared, scaled and shifted at random, with noise."""
    keys = jax.random.split(key, 4)
    angle = jax.random.uniform(keys[0], minval=-0.4, maxval=0.4)
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    matrix = turn @ (jnp.eye(2) + jax.random.uniform(keys[1], (2, 2), minval=-0.25, maxval=0.25)) * 8 / 14
    center = (IMAGE_SIZE - 1) / 2 + jax.random.uniform(keys[2], (2, 1, 1), minval=-2.0, maxval=2.0)
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(IMAGE_SIZE)] * 2, indexing="ij")) - center
    pixels = map_coordinates(image, list(jnp.einsum("ij,jkl->ikl", matrix, grid) + 3.5), order=1)
    return pixels + 0.2 * jax.random.normal(keys[3], pixels.shape)


@functools.cache
def distorted_digits():
    """Images and labels for training, and others that are made of other digits."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32).reshape(-1, 8, 8), jnp.asarray(labels[order])

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, size, start, stop):
        chosen = jax.random.randint(key, (size,), start, stop)
        return jax.vmap(distorted)(jax.random.split(key, size), images[chosen]), labels[chosen]

    keys = jax.random.split(jax.random.key(0))
    return draw(keys[0], TRAIN_SIZE, 0, 1397), draw(keys[1], TEST_SIZE, 1397, 1797)


class Classifier(Task):
    """Of distorted digits."""

    batch_size, size = 128, TRAIN_SIZE

    def __init__(self):
        self.train_set, self.test_set = distorted_digits()

    def loss_fn(self, model, batch, model_state):
        images, labels = batch
        return kfax.softmax_cross_entropy(jax.vmap(model, axis_name="batch")(images), labels), model_state


class Digits(Classifier):
    """An MLP."""

    name, steps, period = "digits", 600, 20

    def model(self, key):
        return eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), eqx.nn.MLP(IMAGE_SIZE**2, 10, 256, 2, key=key)])

    def head(self, model):
        return model[1].layers[-1].weight


class Convnet(Classifier):
    """Convolutions with batch normalization, whose state is threaded."""

    name, steps, period, is_scanned = "convnet", 300, 15, False

    def init(self, key):
        model, model_state = eqx.nn.make_with_state(self.model)(key)
        return kfax.tag(model), model_state

    def model(self, key):
        layers, (*keys, head_key) = [eqx.nn.Lambda(lambda x: x[None])], jax.random.split(key, 4)
        for (num_inputs, num_outputs, stride), conv_key in zip([(1, 8, 1), (8, 16, 2), (16, 32, 2)], keys, strict=True):
            layers.append(eqx.nn.Conv2d(num_inputs, num_outputs, 3, stride, 1, use_bias=False, key=conv_key))
            layers.append(eqx.nn.BatchNorm(num_outputs, axis_name="batch", momentum=0.9, mode="batch"))
            layers.append(eqx.nn.Lambda(jax.nn.relu))
        head = eqx.nn.Linear(32 * (IMAGE_SIZE // 4) ** 2, 10, key=head_key)
        return eqx.nn.Sequential([*layers, eqx.nn.Lambda(jnp.ravel), head])

    def loss_fn(self, model, batch, model_state):
        (images, labels), axes = batch, (0, None)
        logits, model_state = jax.vmap(model, axis_name="batch", in_axes=axes, out_axes=axes)(images, model_state)
        return kfax.softmax_cross_entropy(logits, labels), model_state

    def head(self, model):
        return model[-1].weight


class Recurrent(eqx.Module):
    """Reads an image row by row."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key, width=64):
        keys = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(IMAGE_SIZE, width, key=keys[0])
        self.head = eqx.nn.Linear(width, 10, key=keys[1])

    def __call__(self, image):
        arrays, rest = eqx.partition(self.cell, eqx.is_array)
        start = jnp.zeros(self.head.weight.shape[1])
        return self.head(jax.lax.scan(lambda h, row: (eqx.combine(arrays, rest)(row, h), None), start, image)[0])


class Rows(Classifier):
    """A recurrent network."""

    name, steps, period = "rows", 400, 20

    def model(self, key):
        return Recurrent(key)

    def head(self, model):
        return model.head.weight


class Text(Task):
    """A transformer of characters, whose output head is its embedding, on the text of Python's `help()`."""

    name, steps, period, batch_size = "text", 300, 10, 16

    def __init__(self):
        paragraphs = "\n\n".join(pydoc_data.topics.topics.values()).split("\n\n")
        characters, codes = np.unique(list("\n\n".join(dict.fromkeys(paragraphs))), return_inverse=True)
        self.codes, self.num_characters, end = jnp.asarray(codes, jnp.int32), len(characters), int(0.9 * len(codes))
        self.size = end - transformer.LENGTH
        self.test_set = self.batch(np.linspace(end, len(codes) - transformer.LENGTH - 1, 128, dtype=int))

    def batch(self, indices):
        return self.codes[indices[:, None] + jnp.arange(transformer.LENGTH + 1)]

    def model(self, key):
        return transformer.Transformer(self.num_characters, key)

    def loss_fn(self, model, batch, model_state):
        logits = jax.vmap(model, axis_name="batch")(batch[:, :-1])
        return kfax.softmax_cross_entropy(logits, batch[:, 1:], mean_over_positions=True), model_state

    def head(self, model):
        return model.tied.pytree[0].weight


class Residual(eqx.Module):
    """Dense blocks, each of its normalized input and added to that input."""

    first: eqx.nn.Linear
    norms: list[eqx.nn.LayerNorm]
    blocks: list[eqx.nn.MLP]
    last: eqx.nn.Linear

    def __init__(self, key, num_inputs, num_outputs, width=128, depth=3):
        keys = jax.random.split(key, depth + 2)
        self.first = eqx.nn.Linear(num_inputs, width, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(depth)]
        self.blocks = [eqx.nn.MLP(width, width, width, 1, jax.nn.gelu, key=k) for k in keys[2:]]
        self.last = eqx.nn.Linear(width, num_outputs, key=keys[1])

    def __call__(self, x):
        x = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.last(x)


class Teacher(Task):
    """A residual network that learns a random function, from examples of which each is seen about once."""

    name, steps, period, batch_size, size = "teacher", 600, 20, 256, 2**17
    num_inputs, num_outputs = 16, 8

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        teacher = eqx.nn.MLP(self.num_inputs, self.num_outputs, 64, 2, jnp.tanh, key=keys[0])
        teacher = jax.tree.map(lambda x: 2 * x if eqx.is_inexact_array(x) else x, teacher)
        inputs = jax.random.normal(keys[1], (self.size + TEST_SIZE, self.num_inputs))
        outputs = jax.vmap(teacher)(inputs)
        targets = (outputs - jnp.mean(outputs, axis=0)) / jnp.std(outputs, axis=0)
        self.train_set = inputs[TEST_SIZE:], targets[TEST_SIZE:]
        self.test_set = inputs[:TEST_SIZE], targets[:TEST_SIZE]

    def model(self, key):
        return Residual(key, self.num_inputs, self.num_outputs)

    def loss_fn(self, model, batch, model_state):
        inputs, targets = batch
        return kfax.squared_error(jax.vmap(model, axis_name="batch")(inputs), targets), model_state

    def head(self, model):
        return model.last.weight


TASKS = {task.name: task for task in (Digits, Convnet, Text, Teacher, Rows)}

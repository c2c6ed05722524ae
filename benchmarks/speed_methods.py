"""What `speed.py` measures: networks with their data, and methods that train them."""

import jax
import jax.numpy as jnp
import numpy as np


PERIOD = 5


class Dense:
    """A stack of dense layers, `rows` examples of `positions` positions each; with residual blocks or without."""

    def __init__(self, sizes, examples, positions=1, blocks=0):
        self.sizes, self.examples, self.positions, self.blocks = sizes, examples, positions, blocks

    def weights(self):
        rng, pairs = np.random.default_rng(0), list(zip(self.sizes[:-1], self.sizes[1:], strict=True))
        return [((rng.normal(size=(i, o)) / np.sqrt(i)).astype(np.float32), np.zeros(o, np.float32)) for i, o in pairs]

    def batch(self):
        rng = np.random.default_rng(1)
        shape = (self.examples, self.positions) if self.blocks else (self.examples,)
        if not self.blocks:
            return jnp.asarray(rng.random((*shape, self.sizes[0])) < 0.3, jnp.float32)
        return jnp.asarray(rng.normal(size=(*shape, self.sizes[0])), jnp.float32), jnp.asarray(
            rng.integers(0, self.sizes[-1], shape)
        )

    def forward(self, dense, norm, x):
        """Of functions of an index and an input."""
        last = len(self.sizes) - 2
        if not self.blocks:
            for i in range(last):
                x = jnp.tanh(dense(i, x))
            return dense(last, x)
        for block in range(self.blocks):
            x = x + dense(2 * block + 1, jax.nn.gelu(dense(2 * block, norm(block, x))))
        return dense(last, x)


class Images:
    """Three convolutions, each followed by ReLU and, but for the last, a pooling of 2x2; and a dense layer."""

    channels, size, classes, examples = (3, 32, 64, 128), 32, 10, 128

    def weights(self):
        rng, pairs = np.random.default_rng(0), zip(self.channels[:-1], self.channels[1:], strict=True)
        kernels = [(rng.normal(size=(3, 3, i, o)) / np.sqrt(9 * i), np.zeros(o)) for i, o in pairs]
        width = (self.size // 4) ** 2 * self.channels[-1]
        head = (rng.normal(size=(width, self.classes)) / np.sqrt(width), np.zeros(self.classes))
        return jax.tree.map(lambda x: x.astype(np.float32), [*kernels, head])

    def batch(self):
        rng = np.random.default_rng(1)
        images = rng.normal(size=(self.examples, 3, self.size, self.size))
        return jnp.asarray(images, jnp.float32), jnp.asarray(rng.integers(0, self.classes, self.examples))


class Transformer:
    """Pre-norm blocks with causal attention, in a stack that is scanned with `jax.checkpoint`, on random tokens."""

    depth, width, heads, tokens, examples, positions = 12, 128, 4, 64, 16, 64

    def batch(self):
        ids = np.random.default_rng(1).integers(0, self.tokens, (self.examples, self.positions + 1))
        return jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])


WORKLOADS = {
    "autoencoder": Dense((784, 1000, 500, 250, 30, 250, 500, 1000, 784), 500),
    "tokens": Dense((256, 1024, 256, 1024, 256, 64), 16, 64, blocks=2),
    "convnet": Images(),
    "transformer": Transformer(),
}


def transformer(workload):
    import equinox as eqx

    class Block(eqx.Module):
        norms: list
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys, width = jax.random.split(key, 3), workload.width
            self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
            self.attention = eqx.nn.MultiheadAttention(workload.heads, width, key=keys[0])
            self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
            self.down = eqx.nn.Linear(4 * width, width, key=keys[2])

        def __call__(self, x):
            h = jax.vmap(self.norms[0])(x)
            x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            return x + jax.vmap(lambda h: self.down(jax.nn.gelu(self.up(h))))(jax.vmap(self.norms[1])(x))

    class Net(eqx.Module):
        embedding: eqx.nn.Embedding
        blocks: Block
        norm: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.embedding = eqx.nn.Embedding(workload.tokens, workload.width, key=keys[0])
            self.blocks = eqx.filter_vmap(Block)(jax.random.split(keys[1], workload.depth))
            self.norm = eqx.nn.LayerNorm(workload.width)
            self.head = eqx.nn.Linear(workload.width, workload.tokens, key=keys[2])

        def __call__(self, ids):
            arrays, rest = eqx.partition(self.blocks, eqx.is_array)
            run = jax.checkpoint(lambda x, block: (eqx.combine(block, rest)(x), None))
            x, _ = jax.lax.scan(run, jax.vmap(self.embedding)(ids), arrays)
            return jax.vmap(self.head)(jax.vmap(self.norm)(x))

    return Net(jax.random.key(0))


def equinox_model(workload):
    import equinox as eqx

    if isinstance(workload, Transformer):
        return transformer(workload)

    def linear(w, b):
        layer = eqx.filter_eval_shape(eqx.nn.Linear, *w.shape, key=jax.random.key(0))
        return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (jnp.asarray(w.T), jnp.asarray(b)))

    def conv(w, b):
        layer = eqx.filter_eval_shape(eqx.nn.Conv2d, w.shape[2], w.shape[3], 3, padding=1, key=jax.random.key(0))
        w, b = w.transpose(3, 2, 0, 1), b[:, None, None]
        return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (jnp.asarray(w), jnp.asarray(b)))

    class Net(eqx.Module):
        layers: list
        norms: list

        def __call__(self, x):
            return workload.forward(lambda i, x: self.layers[i](x), lambda i, x: self.norms[i](x), x)

    class Conv(eqx.Module):
        layers: list

        def __call__(self, x):
            *convolutions, head = self.layers
            for i, layer in enumerate(convolutions):
                x = jax.nn.relu(layer(x))
                if i < 2:
                    x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
            return head(x.reshape(-1))

    if isinstance(workload, Images):
        *kernels, head = workload.weights()
        return Conv([*(conv(*each) for each in kernels), linear(*head)])
    norms = [eqx.nn.LayerNorm(workload.sizes[0]) for _ in range(workload.blocks)]
    return Net([linear(*each) for each in workload.weights()], norms)


def outputs_of(workload, model, batch):
    inputs = batch if isinstance(batch, jax.Array) else batch[0]
    by_position = isinstance(workload, Dense) and workload.blocks
    return jax.vmap(jax.vmap(model) if by_position else model)(inputs)


def kfax_loss(workload):
    import kfax

    def loss_fn(model, batch):
        outputs = outputs_of(workload, model, batch)
        if isinstance(batch, jax.Array):
            return kfax.sigmoid_cross_entropy(outputs, batch)
        return kfax.softmax_cross_entropy(outputs, batch[1])

    return loss_fn


def number_of(outputs, batch):
    """The loss as a number, summed over positions and outputs, for methods that need no more."""
    if isinstance(batch, jax.Array):
        return jnp.mean(jnp.sum(jnp.logaddexp(0, outputs) - batch * outputs, axis=-1))
    picked = jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[1][..., None], axis=-1)
    return -jnp.sum(picked) / len(outputs)


def adaptive(kfax, loss_fn):
    auto, damping = kfax.QuadraticModel(), kfax.LevenbergMarquardt(1.0, period=PERIOD)
    return kfax.Optimizer(loss_fn, learning_rate=auto, momentum=auto, damping=damping)


class Kfax:
    """With everything adaptive, or one of the presets."""

    def __init__(self, workload, make=adaptive):
        import equinox as eqx

        import kfax

        self.batch, self.model = workload.batch(), kfax.tag(equinox_model(workload))
        self.optimizer = make(kfax, kfax_loss(workload))

        @eqx.filter_jit(donate="all-except-first")  # as kfac-jax does
        def step(batch, model, state, key):
            return self.optimizer.step(model, state, batch, key=key)

        self.step_fn = step

    def init(self):
        self.state = self.optimizer.init(self.model, self.batch, key=jax.random.key(0))
        return self.state

    def step(self, i):
        self.model, self.state, _ = self.step_fn(self.batch, self.model, self.state, jax.random.key(i))
        return self.model


class KfacJax:
    """With everything adaptive, and the settings of `Kfax`."""

    def __init__(self, workload):
        import kfac_jax

        self.batch = workload.batch()
        self.params = jax.tree.map(jnp.asarray, self.plain(workload))
        auto = {f"use_adaptive_{name}": True for name in ("learning_rate", "momentum", "damping")}

        def value(params, batch):
            outputs = self.outputs(workload, params, batch)
            rows = outputs.reshape(-1, outputs.shape[-1])
            if isinstance(batch, jax.Array):
                kfac_jax.register_sigmoid_cross_entropy_loss(rows, batch)
            else:
                kfac_jax.register_softmax_cross_entropy_loss(rows, batch[1].reshape(-1))
            return number_of(outputs, batch)

        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(value),
            l2_reg=0.0,
            initial_damping=1.0,
            damping_adaptation_interval=PERIOD,
            inverse_update_period=PERIOD,
            num_burnin_steps=0,
            multi_device=False,
            **auto,
        )

    @staticmethod
    def plain(workload):
        width = getattr(workload, "sizes", (0,))[0]
        norms = [(np.ones(width, np.float32), np.zeros(width, np.float32))] * getattr(workload, "blocks", 0)
        return workload.weights(), norms

    @staticmethod
    def outputs(workload, params, batch):
        layers, norms = params
        if isinstance(workload, Images):
            x = batch[0].transpose(0, 2, 3, 1)
            for i, (w, b) in enumerate(layers[:-1]):
                x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
                x = jax.nn.relu(x + b)
                if i < 2:
                    x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]).max((2, 4))
            return x.reshape(len(x), -1) @ layers[-1][0] + layers[-1][1]

        def norm(i, x):
            scale, offset = norms[i]
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale + offset

        inputs = batch if isinstance(batch, jax.Array) else batch[0]
        return workload.forward(lambda i, x: x @ layers[i][0] + layers[i][1], norm, inputs)

    def init(self):
        self.key = jax.random.PRNGKey(0)
        self.state = self.optimizer.init(self.params, self.key, self.batch)
        return self.params

    def step(self, i):
        self.key, key = jax.random.split(self.key)
        self.params, self.state, _ = self.optimizer.step(
            self.params, self.state, key, batch=self.batch, global_step_int=i
        )
        return self.params


class AdamW:
    """Of Optax."""

    def __init__(self, workload):
        import equinox as eqx
        import optax

        self.batch, self.eqx = workload.batch(), eqx
        self.model, self.transform = equinox_model(workload), optax.adamw(1e-3)

        def step(batch, model, state):
            value = lambda model: number_of(outputs_of(workload, model, batch), batch)  # noqa: E731
            gradient = eqx.filter_grad(value)(model)
            updates, state = self.transform.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), state

        self.step_fn = eqx.filter_jit(step, donate="all-except-first")

    def init(self):
        self.state = self.transform.init(self.eqx.filter(self.model, self.eqx.is_inexact_array))
        return self.state

    def step(self, i):
        del i
        self.model, self.state = self.step_fn(self.batch, self.model, self.state)
        return self.model


class ValueAndGradient(AdamW):
    """No step at all: what any method has to compute."""

    def __init__(self, workload):
        super().__init__(workload)
        value = lambda model, batch: number_of(outputs_of(workload, model, batch), batch)  # noqa: E731
        self.step_fn = self.eqx.filter_jit(self.eqx.filter_value_and_grad(value))

    def step(self, i):
        del i
        return self.step_fn(self.model, self.batch)


class Limit:
    """The products of a step: forward, backward twice (gradient and sampled cotangents), moments, forward derivatives

    along two directions, the solve; every 5 steps a forward pass for the damping, and the factorizations.
    """

    def __init__(self, workload):
        rows, pairs = workload.examples * workload.positions, zip(workload.sizes[:-1], workload.sizes[1:], strict=True)
        self.layers = [[self.normal(rows, i + 1), self.normal(rows, o), self.normal(o, i + 1)] for i, o in pairs]
        self.factors = [(self.moment(a), self.moment(g)) for a, g, _ in self.layers]

        def forward():
            return [a @ w.T for a, _, w in self.layers]

        def products():
            for a, g, w in self.layers:
                (left, right) = (jnp.eye(n) + 0 * n for n in (w.shape[0], w.shape[1]))
                yield [a @ w.T, g.T @ a, g @ w, g @ w, a.T @ a, g.T @ g, a @ w.T, g @ w, a @ w.T, g @ w]
                yield [left @ w @ right]

        def inverses():
            for pair in self.factors:
                for m in pair:
                    root = jnp.linalg.cholesky(m + jnp.eye(len(m)), symmetrize_input=False)
                    inverse = jax.lax.linalg.triangular_solve(root, jnp.eye(len(m)), left_side=True, lower=True)
                    yield inverse.T @ inverse

        def probe(results):  # of each of them, so that none is left out, and no more than that
            return [x.ravel()[0] for x in jax.tree.leaves(list(results))]

        self.plain = self.arguments(lambda: probe(products()))
        self.full = self.arguments(lambda: probe([*products(), *inverses(), *forward()]))

    def arguments(self, function):
        """A compiled function of the arrays, which otherwise would be constants."""
        arrays = (self.layers, self.factors)

        def run(arrays):
            self.layers, self.factors = arrays
            return function()

        compiled = jax.jit(run).lower(arrays).compile()
        self.layers, self.factors = arrays
        return lambda: compiled(arrays)

    @staticmethod
    def normal(*shape):
        return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    @staticmethod
    def moment(x):
        return x.T @ x / len(x)

    def init(self):
        return ()

    def step(self, i):
        return self.full() if i % PERIOD == 0 else self.plain()


METHODS = {
    "kfax": Kfax,
    "kfax, full_batch": lambda workload: Kfax(workload, lambda kfax, f: kfax.full_batch(f)),
    "kfax, stochastic": lambda workload: Kfax(workload, lambda kfax, f: kfax.stochastic(f, learning_rate=1e-3)),
    "kfac-jax": KfacJax,
    "adamw": AdamW,
    "value and gradient": ValueAndGradient,
    "limit": Limit,
}

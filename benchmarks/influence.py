"""Influence functions: how close to exact ones, how close to retraining, how fast, and in how much memory.

Run `OPENBLAS_NUM_THREADS=1 python benchmarks/influence.py [part ...]`, with parts among `solves`, `retraining`,
`seconds` and `memory`; all of them, if none is named, in some ten minutes on two busy cores. Prints a table in Markdown
for each. Another block is one more row of `BLOCKS`.

- `solves`: a trained network 64-20-10 of digits, λ = 0.1 of the mean eigenvalue, float64. The correlation (Pearson's)
  over 1,500 training examples of scores with those of a dense solve, the mean over 100 queries: of preconditioners
  alone, and after 10 and 20 iterations of conjugate gradients. The mean of three seeds (the smallest of them).
- `retraining`: the linear datamodelling score (Park et al. 2023, arXiv:2303.14186): the rank correlation, over 50
  random halves of 500 training examples, of what models trained on a half make of a query (log p - log (1 - p) of its
  label) with the sum of the scores of what was left out; the mean over 100 queries. λ is the L2 coefficient of the
  training. Retrained outputs, and scores of models trained on all, are averaged over three initializations.
- `seconds`: milliseconds of the scores of 256 examples: by kfax; by gradients of all examples (`jax.vmap(jax.grad)`)
  and one product of matrices; by forward mode along all directions at once. Medians of alternating runs.
- `memory`: the resident memory of a process of its own: 50,000 examples that come in batches of 500, 100 queries.
"""

import os


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pathlib  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import kfax  # noqa: E402


BLOCKS = {"K-FAC": kfax.KroneckerFactored(inversion=kfax.Eigh()), "EKFAC": kfax.EigenvalueCorrected()}
BY_BLOCKS = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)
EXACT = kfax.ExplicitExactCurvature(kfax.ExactGGN(), decay=1.0)
NUM_QUERIES, BATCH_SIZE, NUM_SEEDS = 100, 500, 3


class Convnet(eqx.Module):
    """Two convolutions of an 8 x 8 image, and a head on their means."""

    layers: list
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.layers = [eqx.nn.Conv2d(i, o, 3, padding=1, key=k) for i, o, k in ((1, 16, keys[0]), (16, 32, keys[1]))]
        self.head = eqx.nn.Linear(32, 10, key=keys[2])

    def __call__(self, image):
        h = image.reshape(1, 8, 8)
        for layer in self.layers:
            h = jnp.tanh(layer(h))
        return self.head(jnp.mean(h, axis=(1, 2)))


def mlp(*widths):
    return lambda key: eqx.nn.MLP(64, 10, widths[0], len(widths), jnp.tanh, key=key)


def loss_fn(model, batch):
    return kfax.softmax_cross_entropy(jax.vmap(model)(batch[0]), batch[1])


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells, num_names=1):
    return "\n".join([row(*cells), row(*["---"] * num_names, *["---:"] * (len(cells) - num_names))])


def digits(seed, num_training):
    """Images and labels of training set and queries."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images, labels = jnp.asarray(data.data[order] / 16), jnp.asarray(data.target[order])
    queries = slice(num_training, num_training + NUM_QUERIES)
    return (images[:num_training], labels[:num_training]), (images[queries], labels[queries])


@eqx.filter_jit
def train(model, batch, weights, l2, num_steps):
    """Full batches of Adam, for the mean over what has weight one."""
    optim = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def objective(arrays):
        logits = jax.vmap(eqx.combine(arrays, rest))(batch[0])
        loss = kfax.softmax_cross_entropy(logits, batch[1], weights=weights).value()
        return loss + l2 / 2 * sum(jnp.sum(x**2) for x in jax.tree.leaves(arrays))

    def step(carry, _):
        arrays, state = carry
        updates, state = optim.update(jax.grad(objective)(arrays), state)
        return (optax.apply_updates(arrays, updates), state), None

    (arrays, _), _ = jax.lax.scan(step, (arrays, optim.init(arrays)), length=num_steps)
    return eqx.combine(arrays, rest)


# -- scores --


def batches_of(batch):
    return [jax.tree.map(lambda x, i=i: x[i : i + BATCH_SIZE], batch) for i in range(0, len(batch[0]), BATCH_SIZE)]


@eqx.filter_jit
def curvature(estimator, model, batches, damping):
    state, parameters = estimator.init(model), kfax.parameters_of(model)
    for batch in batches:
        state = estimator.update(state, loss_fn, model, batch)
    state = estimator.refresh(state, parameters, damping)
    if not isinstance(estimator, kfax.BlockDiagonalCurvature):
        return state
    state = estimator.restart(state, parameters)  # a second pass, for eigenvalues in the bases of the first
    for batch in batches:
        state = estimator.update(state, loss_fn, model, batch)
    return estimator.redamp(state, parameters, damping)


@eqx.filter_jit
def iterate(estimator, state, model, batches, vectors, damping, number):
    """Directions after so many iterations of conjugate gradients."""
    solver = kfax.ConjugateGradients(preconditioner=estimator)

    def one(solving, _):
        for batch in batches:
            solving = solver.update(solving, loss_fn, model, batch)
        return solver.step(solving), None

    return jax.lax.scan(one, solver.init(state, vectors, damping), length=number)[0].solution


@eqx.filter_jit
def score(model, batches, directions):
    influence = kfax.Influence(loss_fn, BY_BLOCKS)
    return jnp.concatenate([influence.scores(model, batch, directions) for batch in batches], axis=1)


def scores_by_blocks(block, model, batches, vectors, damping, numbers):
    """With a block alone, and then as a preconditioner, by number of iterations."""
    own = kfax.set_block(model, lambda model: model, block)
    # The blocks are part of the structure of a vector.
    vectors = jax.tree.unflatten(jax.tree.structure(kfax.parameters_of(own)), jax.tree.leaves(vectors))
    state = curvature(BY_BLOCKS, own, batches, damping)
    directions = [kfax.Influence(loss_fn, BY_BLOCKS).solve(state, vectors)]
    directions += [iterate(BY_BLOCKS, state, own, batches, vectors, damping, number) for number in numbers]
    return [score(own, batches, each) for each in directions]


def correlation(x, y):
    """Pearson's, of the rows of one matrix with those of another: their mean."""
    x, y = (z - jnp.mean(z, axis=1, keepdims=True) for z in (x, y))
    return float(jnp.mean(jnp.sum(x * y, axis=1) / jnp.linalg.norm(x, axis=1) / jnp.linalg.norm(y, axis=1)))


def rank_correlation(x, y):
    """Spearman's, likewise."""
    return correlation(*(jnp.argsort(jnp.argsort(z, axis=1), axis=1).astype(float) for z in (x, y)))


# -- the parts --


def solves(numbers=(10, 20)):
    found = {}
    for seed in range(NUM_SEEDS):
        batch, queries = digits(seed, 1500)
        batches, model = batches_of(batch), kfax.tag(mlp(20)(jax.random.key(seed)))
        model = train(model, batch, jnp.ones(len(batch[0])), 0.0, 300)
        vectors = kfax.Influence(loss_fn, BY_BLOCKS).gradients(model, queries)
        state = curvature(EXACT, model, batches, 1.0)
        damping = float(0.1 * jnp.mean(jnp.diagonal(state.average.value)))
        state = EXACT.refresh(state, kfax.parameters_of(model), damping)
        exact = score(model, batches, kfax.Influence(loss_fn, EXACT).solve(state, vectors))
        plain = [vectors, *(iterate(None, None, model, batches, vectors, damping, number) for number in numbers)]
        scores = {"none": [score(model, batches, each) for each in plain]}
        for name, block in BLOCKS.items():
            scores[name] = scores_by_blocks(block, model, batches, vectors, damping, numbers)
        for name, several in scores.items():
            found.setdefault(name, []).append([correlation(each, exact) for each in several])
    print(head("preconditioner", "applied alone", *(f"{number} iterations" for number in numbers)))
    for name, rows in found.items():
        print(row(name, *(f"{np.mean(column):.3f} ({min(column):.3f})" for column in zip(*rows, strict=True))))


def margin(model, image, label):
    """log p - log (1 - p) of the label."""
    logits = model(image)
    return logits[label] - jax.nn.logsumexp(jnp.where(jnp.arange(len(logits)) == label, -jnp.inf, logits))


def retraining(num_halves=50, num_steps=1000, l2=3e-3, numbers=(5, 20)):
    batch, queries = digits(0, 500)
    keys, batches = jax.random.split(jax.random.key(7), num_halves), batches_of(batch)
    halves = jnp.stack([jax.random.permutation(key, len(batch[0])) < len(batch[0]) // 2 for key in keys]).astype(float)
    retrain = eqx.filter_vmap(train, in_axes=(None, None, 0, None, None))
    margins = eqx.filter_jit(eqx.filter_vmap(lambda model: jax.vmap(lambda x, y: margin(model, x, y))(*queries)))
    table = []
    makers = {"logistic regression 64-10": lambda key: eqx.nn.Linear(64, 10, key=key), "64-20-10": mlp(20)}
    for network, make in makers.items():
        truth, scores = 0.0, {}
        for seed in range(NUM_SEEDS):
            start = make(jax.random.key(seed))
            truth += margins(retrain(start, batch, halves, l2, num_steps)).T
            model = kfax.tag(train(start, batch, jnp.ones(len(batch[0])), l2, num_steps))
            vectors = jax.vmap(eqx.filter_grad(margin), in_axes=(None, 0, 0))(model, *queries)
            exact = kfax.Influence(loss_fn, EXACT).solve(curvature(EXACT, model, batches, l2), vectors)
            found = {"identity": score(model, batches, vectors)}
            for name, block in BLOCKS.items():
                names = [name, *(f"{number} iterations, {name}" for number in numbers)]
                found |= dict(zip(names, scores_by_blocks(block, model, batches, vectors, l2, numbers), strict=True))
            found["dense solve"] = score(model, batches, exact)
            scores = {name: scores.get(name, 0.0) + each for name, each in found.items()}
        cells = [f"{rank_correlation(truth, each @ (1 - halves).T):.3f}" for each in scores.values()]
        table.append((network, *cells))
    print(head("trained model", *scores))
    print(*(row(*cells) for cells in table), sep="\n")


@eqx.filter_jit
def by_gradients(model, batch, directions):
    def loss(model, image, label):
        return -jax.nn.log_softmax(model(image))[label]

    gradients = jax.vmap(eqx.filter_grad(loss), in_axes=(None, 0, 0))(model, *batch)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(directions), strict=True)
    return sum(v.reshape(len(v), -1) @ g.reshape(len(g), -1).T for g, v in pairs)


@eqx.filter_jit
def forwards(model, batch, directions):
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def losses(arrays):
        return loss_fn(eqx.combine(arrays, rest), batch).losses()

    return jax.vmap(jax.linearize(losses, arrays)[1])(directions)


def seconds(repetitions=9):
    functions = {
        "kfax": eqx.filter_jit(kfax.Influence(loss_fn, BY_BLOCKS).scores),
        "gradients of all": by_gradients,
        "forward mode": forwards,
    }
    print(head("network", "parameters", "queries", *functions))
    batch = digits(0, 256)[0]
    for network, make in {"64-20-10": mlp(20), "64-256-256-10": mlp(256, 256), "two convolutions": Convnet}.items():
        model = kfax.tag(make(jax.random.key(0)))
        parameters = kfax.parameters_of(model)
        for number in (1, 10, 100):
            keys = jax.random.split(jax.random.key(1), number)
            directions = jax.vmap(lambda key, p=parameters: optax.tree_utils.tree_random_like(key, p))(keys)
            results = [function(model, batch, directions) for function in functions.values()]
            scale = float(jnp.max(jnp.abs(results[0])))
            assert all(jnp.allclose(each, results[0], atol=1e-4 * scale) for each in results)
            times = {name: [] for name in functions}
            for _ in range(repetitions):
                for name, function in functions.items():
                    start = time.perf_counter()
                    jax.block_until_ready(function(model, batch, directions))
                    times[name].append(1e3 * (time.perf_counter() - start))
            size = sum(leaf.size for leaf in jax.tree.leaves(parameters))
            cells = [f"{statistics.median(each):.3g}" for each in times.values()]
            print(row(network, f"{size:,}", number, *cells), flush=True)


def resident():
    """The largest resident memory so far, in MB. Reads what Linux says of the process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def stream(num_examples=50_000):
    """In a process of its own: curvature and scores of examples of which no two batches exist at once."""
    model = kfax.tag(mlp(256, 256)(jax.random.key(0)))
    solver, influence = kfax.ConjugateGradients(preconditioner=BY_BLOCKS), kfax.Influence(loss_fn, BY_BLOCKS)
    update, scores = eqx.filter_jit(BY_BLOCKS.update), eqx.filter_jit(influence.scores)
    take_in, step = eqx.filter_jit(solver.update), eqx.filter_jit(solver.step)

    def data(number=num_examples):
        for i in range(number // BATCH_SIZE):
            rng = np.random.default_rng(i)
            yield rng.normal(size=(BATCH_SIZE, 64)).astype(np.float32), rng.integers(0, 10, BATCH_SIZE)

    def run(number):
        state = BY_BLOCKS.init(model)
        for batch in data(number):
            state = update(state, loss_fn, model, batch)
        state = eqx.filter_jit(BY_BLOCKS.refresh)(state, kfax.parameters_of(model), 1e-3)
        queries = next(data(BATCH_SIZE))
        vectors = eqx.filter_jit(influence.gradients)(model, jax.tree.map(lambda x: x[:NUM_QUERIES], queries))
        solving = eqx.filter_jit(solver.init)(state, vectors, 1e-3)
        for batch in data(number):
            solving = take_in(solving, loss_fn, model, batch)
        directions = step(solving).solution
        return np.concatenate([np.asarray(scores(model, batch, directions)) for batch in data(number)], axis=1)

    cells = [resident()]
    for number in (BATCH_SIZE, num_examples):
        shape = run(number).shape
        cells.append(resident())
    assert shape == (NUM_QUERIES, num_examples)
    print(row(*(f"{cell:.0f} MB" for cell in cells)))


def memory():
    print(head("before", "after one batch", "after 100 batches", num_names=0), flush=True)
    subprocess.run([sys.executable, __file__, "stream"], check=True)


def main(*names):
    parts = {"solves": solves, "retraining": retraining, "seconds": seconds, "memory": memory, "stream": stream}
    for name in names or list(parts)[:-1]:
        with jax.enable_x64(name == "solves"):
            parts[name]()
        print(flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

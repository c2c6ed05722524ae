"""Wrong labels among handwritten digits, found by influence functions.

Needs `pip install -e '.[examples]'`, and a minute on two cores. A tenth of the training labels are replaced by wrong
ones, and a small network is trained on all of them, until it knows most of them by heart. Before and after that the
training examples are ranked in three ways: by their loss, by their self-influence (K-FAC), and by how much they harm
the loss of held-out examples (exactly, by conjugate gradients preconditioned by K-FAC). Prints which share of the wrong
labels is in the first tenth of each ranking, and saves a picture of the digits with the largest self-influence.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import rich
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits

import kfax


NUM_TRAINING, BATCH_SIZE = 1500, 250


def load(seed):
    """Images and labels in random order, and which of the training labels are wrong."""
    rng, (images, labels) = np.random.default_rng(seed), load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    is_wrong = np.zeros(len(labels), bool)
    is_wrong[rng.permutation(NUM_TRAINING)[: NUM_TRAINING // 10]] = True
    labels = np.where(is_wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
    training, held_out = slice(0, NUM_TRAINING), slice(NUM_TRAINING, None)
    return (images[training], labels[training]), (images[held_out], labels[held_out]), is_wrong[training]


def batches_of(batch):
    return [jax.tree.map(lambda x, i=i: x[i : i + BATCH_SIZE], batch) for i in range(0, len(batch[0]), BATCH_SIZE)]


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


def train(batches, epochs, seed):
    """Models after so many epochs."""
    model = kfax.tag(eqx.nn.MLP(64, 10, 64, 1, activation=jnp.tanh, key=jax.random.key(seed)))
    optimizer = kfax.Optimizer(
        loss_fn,
        learning_rate=kfax.NormConstraint(0.1, bound=1e-3),
        momentum=0.9,
        damping=1e-2,
        l2=1e-4,
        preconditioner=kfax.Preconditioner(inverse_update_period=kfax.Staggered(10)),
    )
    state, step = optimizer.init(model, batches[0], key=jax.random.key(seed)), eqx.filter_jit(optimizer.step)
    for i in track(range(max(epochs)), "training"):
        for j, batch in enumerate(batches):
            model, state, _ = step(model, state, batch, key=jax.random.key(i * len(batches) + j))
        if i + 1 in epochs:
            yield model


BLOCKS = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=1.0)
INFLUENCE, SOLVER = kfax.Influence(loss_fn, BLOCKS), kfax.ConjugateGradients(preconditioner=BLOCKS)
update, add, advance = eqx.filter_jit(BLOCKS.update), eqx.filter_jit(SOLVER.update), eqx.filter_jit(SOLVER.step)
scores, own = eqx.filter_jit(INFLUENCE.scores), eqx.filter_jit(INFLUENCE.self_influence)
losses = eqx.filter_jit(lambda model, batch: loss_fn(model, batch).losses())
gradient = eqx.filter_jit(eqx.filter_grad(lambda model, batch: loss_fn(model, batch).value()))


def rank(model, batches, held_out, num_iterations):
    """Numbers that are largest for what is suspected of a wrong label."""
    parameters, state = kfax.parameters_of(model), BLOCKS.init(model)
    for batch in batches:
        state = update(state, loss_fn, model, batch)
    diagonal = ravel_pytree(BLOCKS.diagonal(state, parameters))[0]
    damping = 0.1 * jnp.mean(diagonal)
    state = BLOCKS.refresh(state, parameters, damping)

    query = jax.tree.map(lambda x: x[None], gradient(model, held_out))
    solving = SOLVER.init(state, query, damping)
    for _ in track(range(num_iterations), "conjugate gradients"):
        for batch in batches:
            solving = add(solving, loss_fn, model, batch)
        solving = advance(solving)

    return {
        "loss": np.concatenate([losses(model, batch) for batch in batches]),
        "self-influence, K-FAC": np.concatenate([own(state, model, batch) for batch in batches]),
        "harm to held-out loss": np.concatenate([-scores(model, batch, solving.solution)[0] for batch in batches]),
    }


def share_found(suspicion, is_wrong):
    """Of the wrong labels, in the first tenth."""
    first = np.argsort(-suspicion)[: len(suspicion) // 10]
    return is_wrong[first].sum() / is_wrong.sum()


def plot(images, labels, is_wrong, suspicion, path):
    figure = Figure(figsize=(8, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    for ax, i in zip(figure.subplots(4, 10).flat, np.argsort(-suspicion), strict=False):
        ax.imshow(images[i].reshape(8, 8), cmap="gray_r")
        ax.set_title(f"{labels[i]}", color="#D55E00" if is_wrong[i] else "#0072B2", weight="bold")
        ax.axis("off")
    figure.suptitle("largest self-influence; labels: wrong ones in orange, right ones in blue")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 100], help="after which to look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/influence.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    epochs, num_iterations = ([1, 2], 1) if options.smoke else (options.epochs, 20)

    training, held_out, is_wrong = load(options.seed)
    batches, table = batches_of(training), Table("epochs", *(Column(f"{number}", justify="right") for number in epochs))
    found = [(m, rank(m, batches, held_out, num_iterations)) for m in train(batches, epochs, options.seed)]
    accuracies = [jnp.mean(jnp.argmax(jax.vmap(m)(held_out[0]), axis=1) == held_out[1]) for m, _ in found]
    table.add_row("held-out accuracy", *(f"{accuracy:.1%}" for accuracy in accuracies), end_section=True)
    for name in found[0][1]:
        table.add_row(f"found by {name}", *(f"{share_found(ranks[name], is_wrong):.1%}" for _, ranks in found))
    plot(*training, is_wrong, found[-1][1]["self-influence, K-FAC"], options.output)
    rich.print(table)


if __name__ == "__main__":
    main()

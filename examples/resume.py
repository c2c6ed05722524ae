"""Trains a classifier of digits that may be killed at any moment: run it again, and it goes on to the same result.

Needs `pip install -e '.[examples]'`. Model, optimizer state and the losses so far are written to one file, which
replaces the old one at once, so that there is always a whole one. Batches and keys follow from the number of the step.
Saves a plot of the losses, with another color for each process that took part.

With `--devices 4` the batch is sharded over a mesh, and checkpoints are written by Orbax. They may be taken up with any
other `--devices`, to the same result up to rounding.
"""

import argparse
import hashlib
import os
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import kfax


def loss_fn(model, batch):
    images, labels = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels)


class OneFile:
    """Checkpoints in a file, written by `equinox`."""

    def __init__(self, path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def save(self, history, model_and_state):
        temporary = self.path.with_suffix(".new")
        with open(temporary, "wb") as file:
            np.save(file, np.array(history))
            eqx.tree_serialise_leaves(file, model_and_state)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def load(self, fresh):
        """The history, and model and state with the shapes and dtypes of fresh ones; these if there is no file."""
        if not self.path.exists():
            return [], *fresh
        with open(self.path, "rb") as file:
            return np.load(file).tolist(), *eqx.tree_deserialise_leaves(file, fresh)


class Folder:
    """Checkpoints in a folder, written by Orbax: of each array every device, or host, writes a part."""

    def __init__(self, path):
        self.manager = ocp.CheckpointManager(os.path.abspath(path), options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, history, model_and_state):
        arrays = ocp.args.StandardSave(jax.tree.leaves(eqx.filter(model_and_state, eqx.is_array)))
        both = ocp.args.Composite(arrays=arrays, history=ocp.args.JsonSave(history))
        self.manager.save(len(history), args=both)
        self.manager.wait_until_finished()

    def load(self, fresh):
        """As from a file; each array gets the sharding of the fresh one, whatever it was saved with."""
        if self.manager.latest_step() is None:
            return [], *fresh
        arrays, rest = eqx.partition(fresh, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        both = ocp.args.Composite(arrays=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore())
        found = self.manager.restore(self.manager.latest_step(), args=both)
        return found["history"], *eqx.combine(jax.tree.unflatten(structure, found["arrays"]), rest)


def plot(history, path):
    figure = Figure(figsize=(7, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    ax = figure.subplots()
    steps, (losses, processes) = np.arange(1, len(history) + 1), np.array(history).T
    for process in np.unique(processes):
        part = processes == process
        ax.plot(steps[part], losses[part], ".-", label=f"process {process + 1:.0f}")
    ax.set(yscale="log", xlabel="steps", ylabel="cross entropy of the batch")
    ax.grid(alpha=0.3)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="how many steps between two checkpoints")
    parser.add_argument("--devices", type=int, help="of a mesh; without it there is none, and Orbax is not used")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a file, or with `--devices` a folder")
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/resume.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_steps = 3 if options.smoke else options.steps
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    if options.devices is not None:
        jax.config.update("jax_num_cpu_devices", options.devices)  # if it is a CPU

    model = kfax.tag(eqx.nn.MLP(64, 10, 32, 2, activation=jnp.tanh, key=jax.random.key(0)))
    if options.devices is None:
        by_example = None
        checkpoints = OneFile(options.checkpoint or pathlib.Path("examples/output/resume.eqx"))
    else:
        mesh = jax.make_mesh((options.devices,), ("data",), devices=jax.devices()[: options.devices])
        by_example = NamedSharding(mesh, PartitionSpec("data"))
        model = eqx.filter_shard(model, NamedSharding(mesh, PartitionSpec()))
        checkpoints = Folder(options.checkpoint or pathlib.Path("examples/output/resume"))
    batch_of = lambda chosen: jax.device_put((images[chosen], labels[chosen]), by_example)  # noqa: E731
    optimizer = kfax.stochastic(loss_fn, learning_rate=0.01)
    fresh = model, optimizer.init(model, batch_of(slice(128)))
    history, model, state = checkpoints.load(fresh)
    if history:
        print(f"goes on from step {state.step}", flush=True)
    process = 1 + history[-1][1] if history else 0
    step = eqx.filter_jit(optimizer.step)
    for i in range(int(state.step), num_steps):
        chosen = np.random.default_rng(i).permutation(len(images))[:128]
        key = jax.random.fold_in(jax.random.key(1), i)
        model, state, info = step(model, state, batch_of(chosen), key=key)
        history.append((float(info.loss), process))
        if (i + 1) % options.every == 0 or i + 1 == num_steps:
            checkpoints.save(history, (model, state))
            print(f"step {i + 1}, loss {info.loss:.6f}", flush=True)
    plot(history, options.output)
    leaves = jax.tree.leaves(eqx.filter((model, state), eqx.is_array))
    print("digest", hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest())


if __name__ == "__main__":
    main()

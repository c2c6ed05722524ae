"""Trains an autoencoder of digits on several processes, each with some devices: one command starts them all.

    python examples/multi_host.py --processes 2 --devices 2

Needs `pip install -e '.[examples]'`. Here the processes run on the CPU of one host, and talk by its loopback interface.
On a cluster each host runs the same program once, with `jax.distributed.initialize()` without arguments where JAX knows
the cluster (Slurm, TPU pods, Kubernetes), and with the address of the first host elsewhere. Each process loads its own
part of every batch. Inverses are shared out among all devices. Stopped, it goes on from `--checkpoint FOLDER`.
"""

import argparse
import os
import socket
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, PartitionSpec
from resume import Folder
from sklearn.datasets import load_digits
from transformer import Block

import kfax


WAIT = 60  # seconds, after which those that wait for a process that is no longer there give up


class Transformer(eqx.Module):
    """Reads and writes an image row by row: four blocks, which are compiled as one."""

    blocks: Block

    def __init__(self, key):
        self.blocks = eqx.filter_vmap(lambda key: Block(key, width=8, heads=2))(jax.random.split(key, 4))

    def __call__(self, image):
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)
        run = lambda x, block: (eqx.combine(block, rest)(x), None)  # noqa: E731
        return jax.lax.scan(run, image.reshape(8, 8), arrays)[0].ravel()


MODELS = {"mlp": lambda key: eqx.nn.MLP(64, 64, 32, 3, activation=jnp.tanh, key=key), "transformer": Transformer}


def loss_fn(model, batch):
    return kfax.sigmoid_cross_entropy(jax.vmap(model)(batch), batch)


def start(options):
    """Runs this program in several processes; the first status that is not zero, after which all others are ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], "--address", address, "--rank"]
    children = [subprocess.Popen([*command, str(rank)]) for rank in range(options.processes)]
    try:
        while children:
            for child in list(children):
                try:
                    status = child.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                children.remove(child)
                if status:
                    return f"a process ended with status {status}, and the others with it"
    finally:
        for child in children:
            child.kill()


def on_all(tree, mesh):
    """The arrays of a PyTree, which every process has, on all devices."""
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays, rest = eqx.partition(tree, eqx.is_array)
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])  # noqa: E731
    return eqx.combine(jax.tree.map(put, arrays), rest)


def check_copies(tree):
    """That of each array that is on all devices, of all processes, all copies are equal to the last bit."""
    arrays = [x for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array)) if x.is_fully_replicated]
    copies = zip(*([shard.data for shard in x.addressable_shards] for x in arrays), strict=True)
    copies = [np.frombuffer(b"".join(np.asarray(x).tobytes() for x in copy), np.uint8) for copy in copies]
    copies = process_allgather(np.stack(copies), tiled=True)
    assert copies.shape[0] == jax.device_count() and np.all(copies == copies[0])


def train(options):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    images = (load_digits(return_X_y=True)[0] / 16).astype(jnp.result_type(float))

    def batch_of(i):
        chosen = np.random.default_rng(i).permutation(len(images))[: options.batch]
        mine = np.split(chosen, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(by_example, images[mine])

    model = on_all(kfax.tag(MODELS[options.model](jax.random.key(0))), mesh)
    optimizer = kfax.full_batch(loss_fn, estimator=kfax.BlockDiagonalCurvature(placement=kfax.Placement(mesh)))
    state, step = optimizer.init(model, batch_of(0)), eqx.filter_jit(optimizer.step)
    checkpoints = Folder(options.checkpoint) if options.checkpoint else None
    history, model, state = checkpoints.load((model, state)) if checkpoints else ([], model, state)
    for i in range(int(state.step), options.steps):
        model, state, info = step(model, state, batch_of(i), key=jax.random.key(i))
        history.append((float(info.loss), float(info.damping)))
        if options.verify:
            check_copies((model, state))
        if checkpoints and (i + 1) % 5 == 0:
            checkpoints.save(history, (model, state))
        if jax.process_index() == 0 and (i + 1) % 5 == 0:
            print(f"step {i + 1}, loss {info.loss:.6f}, {jax.device_count()} devices", flush=True)
    if options.save and jax.process_index() == 0:
        numbers = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(kfax.parameters_of(model))])
        np.savez(options.save, history=np.array(history), parameters=np.asarray(numbers))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--checkpoint", help="a folder that all processes see, written to every 5 steps")
    parser.add_argument("--verify", action="store_true", help="compare the copies of model and state after each step")
    parser.add_argument("--save", help="a file for losses, dampings and parameters")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.batch = 3, 64
    if options.rank is None:
        sys.exit(start(options))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    jax.config.update("jax_num_cpu_devices", options.devices)
    jax.distributed.initialize(
        options.address, options.processes, options.rank, initialization_timeout=WAIT, heartbeat_timeout_seconds=WAIT
    )
    train(options)


if __name__ == "__main__":
    main()

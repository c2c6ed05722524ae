"""Training that is interrupted ends as training that is not, to the last bit."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from cases import grid, make_case

import kfax


EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "resume.py"
AUTO = kfax.QuadraticModel()
OPTIMIZERS = {
    "full batch": kfax.full_batch,
    "stochastic": lambda loss_fn: kfax.stochastic(loss_fn, learning_rate=0.01),
    "power": lambda loss_fn: kfax.Optimizer(
        loss_fn, learning_rate=0.1, momentum=0.5, damping=0.1, preconditioner=kfax.Preconditioner(exponent=-0.5)
    ),
}


def run(optimizer, case, model, state, steps):
    step = eqx.filter_jit(optimizer.step)
    for _ in range(steps):
        model, state, _ = step(model, state, case.batch, key=jax.random.fold_in(jax.random.key(0), state.step))
    return model, state


def through_equinox(path, tree, like):
    eqx.tree_serialise_leaves(path / "state.eqx", tree)
    return eqx.tree_deserialise_leaves(path / "state.eqx", like)


def through_orbax(path, tree, like):
    arrays, _ = eqx.partition(tree, eqx.is_array)
    shapes, static = eqx.partition(like, eqx.is_array)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", jax.tree.leaves(arrays))
        checkpointer.wait_until_finished()
        leaves = checkpointer.restore(path / "state", jax.tree.leaves(shapes))
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), leaves), static)


@grid(thin=2, kind=OPTIMIZERS, way=[through_equinox, through_orbax], slow=lambda kind, way: kind == "power")
def test_a_state_from_a_file_goes_on_to_the_same_bits(kind, way, tmp_path):
    case = make_case("mlp", "softmax")
    optimizer = OPTIMIZERS[kind](case.loss_fn)
    start = case.model, eqx.filter_jit(optimizer.init)(case.model, case.batch)
    halfway = run(optimizer, case, *start, 4)
    like = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, start)
    model, state = restored = way(tmp_path, halfway, like)
    assert bool(eqx.tree_equal(restored, halfway))
    assert bool(eqx.tree_equal(run(optimizer, case, model, state, 3), run(optimizer, case, *halfway, 3)))


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_training_goes_on_to_the_same_bits(kills, tmp_path):
    """SIGKILL at random moments: while starting, while training, while a checkpoint is written."""

    def command(name):
        return [sys.executable, str(EXAMPLE), "--steps", "60", "--every", "1", "--checkpoint", str(tmp_path / name),
                "--output", str(tmp_path / "plot.png")]  # fmt: skip

    whole = subprocess.run(command("whole.eqx"), stdout=subprocess.PIPE, text=True, check=True).stdout
    chance = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(command("parts.eqx"), stdout=subprocess.PIPE, text=True)
        for _ in range(chance.randrange(4) if kills > 1 else 3):  # at least one checkpoint
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    parts = subprocess.run(command("parts.eqx"), stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "goes on from step" in parts
    assert parts.splitlines()[-1] == whole.splitlines()[-1]
    assert whole.splitlines()[-1].startswith("digest")
    assert (tmp_path / "plot.png").stat().st_size > 10_000

"""A long training on bad batches of random sizes that is killed again and again: what becomes of it.

    python benchmarks/soak.py

The classifier 64-32-10 of the digits, in float32, by `kfax.stochastic`, and by K-FAC with its inverses spread over ten
steps, with numbers by hand and with the adaptive coefficients of `kfax.full_batch`. Each is trained three times, for
20,000 steps on the same batches of 8, 32 or 128 examples:

- *killed*: the first batch and one in twenty cannot be used (NaNs or infinities in pixels, weights that are none), in
  another one in fifty a pixel is so large that only its square overflows. The process is killed from outside, by
  SIGKILL, again and again after random times, and a new one goes on from the last checkpoint, as in
  `examples/resume.py`;
- *bad batches*: the same in one process;
- *neither*: in one process that is never given the batches that cannot be used. Such a batch takes its turn: it counts
  in `state.step`, and inverses or bases that are due at it are computed anew from the statistics that there are. So in
  its place this run calls `maybe_refresh` of the preconditioner, which sees no batch, and raises the counter.

The digest is of all bits of model and state. Ends with an error if digests of a method differ, if a number is not
finite, if any other batch than the bad ones was skipped, or if a process traced the step twice for one size of batch.
The resident set is that of the process which took the most steps, and its slope that of a line through all but its
first quarter. Runs on Linux.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from typing import Any


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import kfax  # noqa: E402


SIZES: tuple[int, ...] = (8, 32, 128)
# What spoils a batch, and where: in one pixel, all pixels of an example, or of all; or in the weight of an example.
BAD = [(np.nan, "pixel"), (np.nan, "example"), (np.nan, "batch"), (np.inf, "pixel"), (-np.inf, "example"),
       (np.nan, "weight"), (np.inf, "weight"), (-1.0, "weight")]  # fmt: skip
LARGE = (1e30, "pixel")
TALLIES = {
    "successful": kfax.StepResult.successful,
    "without statistics": kfax.StepResult.non_finite_curvature,
    "undone": kfax.StepResult.rejected,
    "skipped": kfax.StepResult.non_finite_batch,
}


def stochastic(loss_fn):
    return kfax.stochastic(loss_fn, learning_rate=0.003, weight_decay=0.1)


def kfac(loss_fn):
    return kfax.Optimizer(
        loss_fn,
        learning_rate=kfax.NormConstraint(0.03, bound=1e-3),
        momentum=0.9,
        damping=1e-2,
        preconditioner=kfax.Preconditioner(inverse_update_period=kfax.Staggered(10)),
    )


def adaptive(loss_fn):
    auto = kfax.QuadraticModel()
    return kfax.Optimizer(
        loss_fn,
        learning_rate=auto,
        momentum=auto,
        damping=kfax.RelativeDamping(kfax.LevenbergMarquardt(1.0, decay=0.8, period=5, minimum=1e-4)),
        preconditioner=kfax.Preconditioner(inverse_update_period=kfax.Staggered(10)),
        rejection=kfax.Rejection(),
    )


METHODS = {"stochastic": stochastic, "kfac": kfac, "adaptive": adaptive}
NAMES = {"stochastic": "`kfax.stochastic`", "kfac": "K-FAC by hand", "adaptive": "K-FAC, adaptive"}
RUNS = {"killed": (True, True), "bad batches": (True, False), "neither": (False, False)}


def draw(digits, i):
    """Images, labels and weights of a step's batch, and whether it cannot be used."""
    rng = np.random.default_rng(i)
    size = int(rng.choice(SIZES))
    chosen = rng.permutation(len(digits.data))[:size]
    images, labels = np.asarray(digits.data[chosen] / 16, np.float32), digits.target[chosen]
    weights = rng.uniform(0.5, 1.5, size).astype(np.float32)
    chance, row, column = rng.random(), rng.integers(size), rng.integers(images.shape[1])
    is_bad = i == 0 or chance < 0.05
    if is_bad or chance < 0.07:
        value, where = BAD[rng.integers(len(BAD))] if is_bad else LARGE
        places = {
            "pixel": (images, (row, column)),
            "example": (images, row),
            "batch": (images, slice(None)),
            "weight": (weights, row),
        }
        array, place = places[where]
        array[place] = value
    return (images, labels, weights), is_bad


def loss_fn(model, batch):
    images, labels, weights = batch
    return kfax.softmax_cross_entropy(jax.vmap(model)(images), labels, weights=weights)


class Training:
    """The programs of one process, and how often that of a step was traced."""

    def __init__(self, method):
        self.traces = dict.fromkeys(SIZES, 0)
        self.optimizer = METHODS[method](loss_fn)
        self.step, self.skip = eqx.filter_jit(self._step), eqx.filter_jit(self._skip)

    def start(self, digits):
        model = kfax.tag(eqx.nn.MLP(64, 10, 32, 1, activation=jnp.tanh, key=jax.random.key(0)))
        batch = np.float32(digits.data[:128] / 16), digits.target[:128], np.ones(128, np.float32)
        return model, self.optimizer.init(model, batch)

    def _step(self, model, state, batch, key):
        self.traces[len(batch[0])] += 1  # while it is traced, and not when it runs
        model, state, info = self.optimizer.step(model, state, batch, key=key)
        return model, state, jnp.stack([info.result == result for result in TALLIES.values()])

    def _skip(self, model, state):
        """The state after a batch that could not be used, without it."""
        damping, preconditioner = self.optimizer.damping, self.optimizer.preconditioner
        rule = damping.rule if isinstance(damping, kfax.RelativeDamping) else damping
        number, parameters = rule.value(state.damping, state.step), kfax.parameters_of(model)
        known = state.preconditioner, parameters, state.step
        _, own = preconditioner.dampings(damping, number, None, *known)
        preconditioner, _ = preconditioner.maybe_refresh(state.preconditioner, parameters, own, state.step)
        return eqx.tree_at(lambda s: (s.step, s.preconditioner), state, (state.step + 1, preconditioner))


def resident_mib():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def save(path, history, tallies, model_and_state):
    temporary = path.with_suffix(".new")
    with open(temporary, "wb") as file:
        np.save(file, np.array(history))
        np.save(file, tallies)
        eqx.tree_serialise_leaves(file, model_and_state)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def train(method, steps, every, is_spoiled, path, process, progress):
    """Trains from the last checkpoint on, and writes what came of it when it gets to the end."""
    # A process that is killed could leave half a program there.
    jax.config.update("jax_enable_compilation_cache", False)
    digits: Any = load_digits()
    training = Training(method)
    model, state = training.start(digits)
    history, tallies = [], np.zeros(len(TALLIES), int)
    if path.exists():
        with open(path, "rb") as file:
            history, tallies = np.load(file).tolist(), np.load(file)
            model, state = eqx.tree_deserialise_leaves(file, (model, state))
    for i in range(int(state.step), steps):
        batch, is_bad = draw(digits, i)
        if is_bad and not is_spoiled:
            state = training.skip(model, state)
        else:
            model, state, flags = training.step(model, state, batch, jax.random.key(i))
            tallies += np.asarray(flags)
            result = [name for name, flag in zip(TALLIES, np.asarray(flags), strict=True) if flag]
            if not result or is_bad != (result == ["skipped"]):
                raise SystemExit(f"{method}: step {i} was {result}, the batch bad: {is_bad}")
        if (i + 1) % every == 0 or i + 1 == steps:
            history.append((process, i + 1, resident_mib(), *training.traces.values()))
            save(path, history, tallies, (model, state))
            progress.value = i + 1
    leaves = [np.asarray(x) for x in jax.tree.leaves(eqx.filter((model, state), eqx.is_array))]
    outputs = jax.vmap(model)(np.float32(digits.data / 16))
    result = {
        "history": history,
        "tallies": dict(zip(TALLIES, tallies.tolist(), strict=True)),
        "is_finite": all(np.isfinite(x).all() for x in leaves),
        "digest": hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest(),
        "loss": float(kfax.softmax_cross_entropy(outputs, digits.target).value()),
    }
    path.with_suffix(".json").write_text(json.dumps(result))


def run(method, name, options, folder):
    """Starts processes until one gets to the end, and kills all before it."""
    is_spoiled, is_killed = RUNS[name]
    rng, context = np.random.default_rng(0), multiprocessing.get_context("spawn")
    moments = sorted(rng.integers(0, options.steps, options.kills)) if is_killed else []
    path, progress = folder / f"{method} {name}", context.RawValue("q", 0)
    arguments = method, options.steps, options.every, is_spoiled, path
    for number, moment in enumerate([*moments, None]):
        process = context.Process(target=train, args=(*arguments, number, progress))
        process.start()
        if moment is not None:
            while progress.value < moment and process.is_alive():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, options.pause))
            process.kill()
        process.join()
        if process.exitcode and not (moment is not None and process.exitcode < 0):
            raise SystemExit(f"{method}, {name}: process {number} failed")
    return json.loads(path.with_suffix(".json").read_text()) | {"processes": len(moments) + 1}


def row(method, name, result):
    history = np.array(result["history"])
    process, steps, resident, traces = *history.T[:3], history[:, 3:]
    longest = process == np.bincount(process.astype(int)).argmax()
    quarters, late = np.array_split(resident[longest], 4), np.arange(longest.sum()) >= longest.sum() // 4
    slope = np.polyfit(steps[longest][late], resident[longest][late], 1)[0] if late.sum() > 1 else np.nan
    tallies = result["tallies"]
    cells = (
        NAMES[method], name, result["processes"],
        *(tallies[name] for name in ("skipped", "without statistics", "undone")),
        f"{traces.max():.0f}", f"{quarters[1].mean():.1f}, {quarters[3].mean():.1f}", f"{1000 * slope:.3f}",
        "all" if result["is_finite"] else "not all", f"{result['loss']:.3g}", f"`{result['digest'][:8]}`",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def check(method, results):
    traces = max(max(line[3:]) for result in results.values() for line in result["history"])
    if traces > 1:
        raise SystemExit(f"{method}: a process traced the step {traces} times for one size of batch")
    if not all(result["is_finite"] for result in results.values()):
        raise SystemExit(f"{method}: model or state are not finite")
    if len({result["digest"] for result in results.values()}) > 1:
        raise SystemExit(f"{method}: model and state depend on kills or on bad batches")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--every", type=int, default=100, help="how many steps between two checkpoints")
    parser.add_argument("--pause", type=float, default=3.0, help="the longest time before a process is killed, seconds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args()
    runs = tuple(RUNS)
    if options.smoke:
        options.steps, options.kills, options.every, options.pause, runs = 60, 1, 5, 0.1, ("killed", "neither")
    print("| method | run | processes | skipped | without statistics | undone | traces for a size | "
          "MiB, second and last quarter | MiB for 1,000 steps | finite | loss at the end | digest |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            results = {name: run(method, name, options, pathlib.Path(folder)) for name in runs}
            for name, result in results.items():
                print(row(method, name, result), flush=True)
            check(method, results)


if __name__ == "__main__":
    main()

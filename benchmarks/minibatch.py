"""Five small tasks on mini-batches, with all methods tuned alike: steps and seconds to what AdamW reaches.

    python benchmarks/minibatch.py
    python benchmarks/minibatch.py --tasks digits --methods adamw kfax --trials 12

Every method has the same number of trials, whose numbers are spread over its space (`minibatch_methods.py`), on a seed
that is not reported. Its best three are run on two more such seeds, and the best of them on average is reported, on ten
other seeds. The target of a task is the worst held-out loss at the end of AdamW's ten runs: it reaches it in all.

Then all of this once more with schedules of a part of the budget, since with a learning rate that falls late the loss
falls late: numbers are tuned again, in the same way, and the target is the same.

Each run is kept in `benchmarks/results/minibatch/`, so that the command may be interrupted and goes on where it was.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import time


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import minibatch_report  # noqa: E402
import numpy as np  # noqa: E402
from minibatch_methods import METHODS, schedule  # noqa: E402
from minibatch_tasks import TASKS  # noqa: E402


TUNING_SEEDS, FINALISTS = (100, 101, 102), 3


class Program:
    """A task trained by a method: compiled once for all numbers and seeds."""

    def __init__(self, task, method):
        self.task = task
        make = lambda numbers: method.make(task, numbers, schedule(numbers))  # noqa: E731

        @eqx.filter_jit
        def start(numbers, key):
            model, model_state = task.init(key)
            batch = task.batch(jnp.zeros(task.batch_size, int))
            return model, make(numbers)[0](model, batch, model_state), model_state

        def one(numbers, carry, indices, key):
            model, state, model_state = carry
            model, state, model_state, loss = make(numbers)[1](model, state, task.batch(indices), model_state, key)
            return (model, state, model_state), loss

        @eqx.filter_jit
        def scan(numbers, carry, indices, keys):
            arrays, rest = eqx.partition(carry, eqx.is_array)

            def body(arrays, each):
                carry, loss = one(numbers, eqx.combine(arrays, rest), *each)
                return eqx.filter(carry, eqx.is_array), loss

            arrays, losses = jax.lax.scan(body, arrays, (indices, keys))
            return eqx.combine(arrays, rest), losses

        self.start, self.one, self.scan = start, eqx.filter_jit(one), scan
        measure = eqx.filter_jit(lambda carry, test_set: task.held_out_loss(carry[0], carry[2], test_set))
        self.measure = lambda carry: measure(carry, task.test_set)  # which is no constant: these are folded

    def advance(self, numbers, carry, indices, key):
        """Carry and mean training loss after a stretch of steps: in one program, or one for each step."""
        keys, losses = jax.random.split(key, len(indices)), []
        if self.task.is_scanned:
            carry, losses = self.scan(numbers, carry, indices, keys)
        else:
            for each in zip(indices, keys, strict=True):
                carry, loss = self.one(numbers, carry, *each)
                losses.append(loss)
        return carry, jnp.mean(jnp.asarray(losses))

    def begin(self, numbers, seed, num_steps):
        """Numbers, the first carry, and what the steps up to each evaluation need: examples and a key."""
        numbers = {name: jnp.asarray(x, jnp.float32) for name, x in (numbers | {"steps": num_steps}).items()}
        shape = (num_steps // self.task.period, self.task.period, self.task.batch_size)
        indices, key = np.random.default_rng(seed).integers(self.task.size, size=shape), jax.random.key(seed)
        stretches = [(jnp.asarray(each), jax.random.fold_in(key, i + 1)) for i, each in enumerate(indices)]
        return numbers, self.start(numbers, key), stretches

    def run(self, numbers, seed, num_steps):
        """Held-out losses from the first one on, and training losses averaged between them."""
        numbers, carry, stretches = self.begin(numbers, seed, num_steps)
        held_out, train = [float(self.measure(carry))], []
        for stretch in stretches:
            carry, loss = self.advance(numbers, carry, *stretch)
            held_out.append(float(self.measure(carry)))
            train.append(float(loss))
        return {"held_out": held_out, "train": train}


class Experiment:
    """The runs of a task by a method: kept in a file, compiled when the first one is needed."""

    def __init__(self, task, name, folder):
        self.task, self.name, self.method, self._program = task, name, METHODS[name], None
        self.path = folder / f"{task.name}-{name}.json"
        self.runs = json.loads(self.path.read_text()) if self.path.exists() else {}

    @property
    def program(self):
        if self._program is None:
            self._program = Program(self.task, self.method)
        return self._program

    def run(self, numbers, seed, fraction=1.0):
        """A run with a schedule of this fraction of the budget, from the file if it is there with the same numbers."""
        num_steps = round(self.task.steps * fraction / self.task.period) * self.task.period
        key = f"{num_steps} of {self.task.steps} steps, seed {seed}, {json.dumps(numbers, sort_keys=True)}"
        if key not in self.runs:
            started = time.perf_counter()
            self.runs[key] = self.program.run(numbers, seed, num_steps)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.runs))
            last = self.runs[key]["held_out"][-1]
            setting = ", ".join(f"{name} {x:.2g}" for name, x in numbers.items())
            head = f"{self.task.name}, {self.name}, {num_steps} steps, seed {seed}, {setting}"
            print(f"{head}: {last:.4f} in {time.perf_counter() - started:.1f} s", flush=True)
        return self.runs[key]

    def last(self, numbers, seeds, fraction=1.0):
        """Held-out losses at the end."""
        return [self.run(numbers, seed, fraction)["held_out"][-1] for seed in seeds]

    def tune(self, trials, fraction=1.0):
        """The numbers that are best on the tuning seeds, with schedules of this fraction of the budget."""
        last = functools.partial(self.last, fraction=fraction)
        first = [(last(numbers, TUNING_SEEDS[:1])[0], numbers) for numbers in self.method.trials(trials)]
        finalists = [numbers for _, numbers in sorted(first, key=lambda each: _finite(each[0]))[:FINALISTS]]
        return min(finalists, key=lambda numbers: np.mean(_finite(last(numbers, TUNING_SEEDS))))


def _finite(losses):
    return np.where(np.isfinite(losses), losses, np.inf)


def time_steps(experiments, rounds):
    """Seconds of a step of each method, by medians of stretches that alternate, all in this process."""
    begun = {}
    for name, each in experiments.items():
        numbers, carry, stretches = each.program.begin(each.method.trials(1)[0], 0, 3 * each.task.period)
        for stretch in stretches[:2]:  # the first one is compiled
            carry, _ = jax.block_until_ready(each.program.advance(numbers, carry, *stretch))
        begun[name] = (each.program, numbers, carry, *stretches[2]), []
    for _ in range(rounds):
        for (program, *arguments), seconds in begun.values():
            started = time.perf_counter()
            jax.block_until_ready(program.advance(*arguments))
            seconds.append((time.perf_counter() - started) / program.task.period)
    return {name: float(np.median(seconds)) for name, (_, seconds) in begun.items()}


def seconds_of_steps(task, experiments, options):
    """AdamW's last timing times the ratio of a method to it, from a process that timed both; NaN if none did."""
    path = options.results / f"{task.name}-seconds.json"
    kept = json.loads(path.read_text()) if path.exists() else {"adamw": math.nan, "ratios": {}}
    if options.rounds:
        found = time_steps(experiments, options.rounds)
        kept["adamw"] = found["adamw"]
        kept["ratios"] |= {name: seconds / found["adamw"] for name, seconds in found.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept))
    return {name: kept["adamw"] * kept["ratios"].get(name, math.nan) for name in experiments}


def compare(task, options):
    """A row for each method."""
    experiments = {name: Experiment(task, name, options.results) for name in dict.fromkeys(["adamw", *options.methods])}
    seeds, adamw = range(options.seeds), experiments["adamw"]
    target = max(adamw.last(adamw.tune(options.trials), seeds))
    seconds = seconds_of_steps(task, experiments, options)

    def runs(each, fraction):
        numbers = each.tune(options.trials, fraction)
        found = [each.run(numbers, seed, fraction) for seed in seeds]
        return minibatch_report.Runs(numbers, task.period, target, found)

    rows = []
    for name in options.methods:
        whole, short = runs(experiments[name], 1.0), None
        if options.short:
            short = runs(experiments[name], options.short)
        rows.append(minibatch_report.Row(task, name, seconds[name], whole, short))
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["adamw", "muon", "soap", "kfac", "kfax"])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=11, help="of timing; with 0 the last timings are taken")
    parser.add_argument("--short", type=float, default=0.6, help="part of the budget for short schedules; 0 for none")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "minibatch")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    tasks = [TASKS[name]() for name in options.tasks]
    if options.smoke:
        options.trials, options.seeds, options.rounds = 1, 2, 1
        for task in tasks:
            task.steps, task.period, task.batch_size = 10, 1, 8
    rows = [row for task in tasks for row in compare(task, options)]
    print(minibatch_report.table(rows))
    minibatch_report.save(rows, options.results)


if __name__ == "__main__":
    main()

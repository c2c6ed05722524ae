"""Seconds from nothing to the first step, of a step, and peak memory: kfax, kfac-jax, AdamW, and what arithmetic takes.

    python benchmarks/speed.py --kfac-jax path/to/python        # an environment with jax==0.9.0 and kfac-jax==0.0.8
    python benchmarks/speed.py autoencoder --methods kfax adamw

Every method runs in a process of its own, for each repetition a new one; they live side by side and take turns, some
steps each, while the others wait. A step is timed until its parameters are there. With everything adaptive: learning
rate, momentum and damping from the quadratic model; the inverse and the damping every 5 steps. `start` is `init` with
the first six steps less the median of later ones, that is with the compilation of all programs. `limit` is the matrix
products and factorizations of such a step by themselves, for the workloads of dense layers. Runs on whatever device JAX
finds, and then peak memory is the device's. Results are in `benchmarks/results/speed.json`, beside a plot of them; the
table is of medians over repetitions.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time


# LAPACK's own threads wait for XLA's: for all methods alike. An accelerator's memory is taken as it is needed, for the
# methods live side by side on it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
from speed_methods import Dense, METHODS, PERIOD, Transformer, WORKLOADS  # noqa: E402


RESULTS = pathlib.Path(__file__).parent / "results"
TURN, TURNS = 10, 3


def serve(method, workload):
    """A child: for each line of standard input, a number of steps, prints their seconds; at the end its memory."""
    runner, count = METHODS[method](WORKLOADS[workload]), 0
    jax.block_until_ready(jax.tree.leaves([v for v in vars(runner).values() if not callable(v)]))

    def timed(function, *args):
        start = time.perf_counter()
        jax.block_until_ready([x for x in jax.tree.leaves(function(*args)) if isinstance(x, jax.Array)])
        return time.perf_counter() - start

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        if line.strip() == "init":
            print(json.dumps([timed(runner.init)]), flush=True)
            continue
        seconds = []
        for _ in range(int(line)):
            seconds.append(timed(runner.step, count))
            count += 1
        print(json.dumps(seconds), flush=True)
    device = jax.devices()[0]
    memory = device.memory_stats() if device.platform != "cpu" else None
    peak = memory["peak_bytes_in_use"] if memory else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(peak), flush=True)


class Child:
    """A process that serves one method."""

    def __init__(self, python, method, workload):
        command = [python, __file__, "--serve", method, workload]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.listen()

    def listen(self):
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        return self.listen()


def measure(workload, pythons):
    """One repetition: the seconds of each method, by name."""
    children = {name: Child(python, name, workload) for name, python in pythons.items()}
    for child in children.values():
        child.listen()  # until it has imported what it needs
    init = {name: child.ask("init")[0] for name, child in children.items()}
    first = {name: child.ask(2 * PERIOD) for name, child in children.items()}
    steps = {name: [] for name in children}
    for _ in range(TURNS):
        for name, child in children.items():
            steps[name] += child.ask(TURN)
    rows = {}
    for name, child in children.items():
        typical = statistics.median(steps[name])
        start = init[name] + sum(max(each - typical, 0) for each in first[name][: PERIOD + 1])
        rows[name] = {"init": init[name], "start": start, "median": typical, "mean": statistics.mean(steps[name]),
                      "peak": child.end()}  # fmt: skip
    return rows


def applies(method, workload):
    """Whether a method is written for a workload."""
    if method == "limit":
        return isinstance(workload, Dense)
    return method != "kfac-jax" or not isinstance(workload, Transformer)


def plot(found, path):
    """Start, mean step and memory of each method, a row of panels for each workload."""
    from matplotlib.figure import Figure

    columns = (("start", "seconds to the first step", 1), ("mean", "ms a step, mean", 1e3), ("peak", "peak MB", 1e-6))
    figure = Figure(figsize=(11, 1.9 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), len(columns), squeeze=False)
    for row, (workload, methods) in zip(panels, found.items(), strict=True):
        for panel, (name, title, unit) in zip(row, columns, strict=True):
            values = [unit * each[name] for each in methods.values()]
            bars = panel.barh(list(methods), values, color=["C0" if "kfax" in name else "C7" for name in methods])
            panel.bar_label(bars, fmt="{:.3g}", padding=2)
            panel.margins(x=0.2)
            panel.invert_yaxis()
            panel.set_title(f"{workload}: {title}", fontsize="medium")
            panel.label_outer()
    figure.savefig(path)


def main(options):
    path = RESULTS / "speed.json"
    RESULTS.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    print("| workload | method | init s | start s | step ms: median | mean | peak MB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for workload in options.workloads or WORKLOADS:
        pythons = {name: options.kfac_jax if name == "kfac-jax" else sys.executable for name in options.methods}
        pythons = {name: python for name, python in pythons.items() if python and applies(name, WORKLOADS[workload])}
        runs = [measure(workload, pythons) for _ in range(options.repetitions)]
        medians = {n: {k: statistics.median(run[n][k] for run in runs) for k in runs[0][n]} for n in pythons}
        found[workload] = found.get(workload, {}) | medians
        for name, row in medians.items():
            cells = f"{row['init']:.1f} | {row['start']:.1f} | {1e3 * row['median']:.3g} | {1e3 * row['mean']:.3g}"
            print(f"| {workload} | {name} | {cells} | {row['peak'] / 1e6:.0f} |", flush=True)
        path.write_text(json.dumps(found, indent=1))
    plot(found, path.with_suffix(".svg"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []], default=[])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kfac-jax", metavar="PYTHON")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    serve(*arguments.serve) if arguments.serve else main(arguments)

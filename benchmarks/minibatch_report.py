"""The table, the summary and the plots of `minibatch.py`."""

import json
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure


class Runs(NamedTuple):
    """Ten runs of a method with a schedule of some length, and the numbers that were chosen for that length."""

    numbers: dict
    period: int
    target: float
    runs: list

    @property
    def curves(self):
        """Held-out losses by seed and evaluation."""
        return np.array([run["held_out"] for run in self.runs])

    @property
    def last(self):
        return self.curves[:, -1]

    @property
    def steps(self):
        return self.period * (self.curves.shape[1] - 1)

    @property
    def steps_to_target(self):
        """Of the seeds that reach it."""
        reached = self.curves <= self.target
        return self.period * np.argmax(reached, axis=1)[np.any(reached, axis=1)]

    @property
    def diverged(self):
        return int(np.sum(~(self.last <= self.curves[:, 0])))

    def summary(self, seconds):
        """As it is saved, for so many seconds a step."""
        reached = self.steps_to_target
        steps = float(np.mean(reached)) if len(reached) else None
        return {
            "numbers": self.numbers,
            "schedule": self.steps,
            "last": [float(np.mean(self.last)), _error(self.last)],
            "diverged": self.diverged,
            "steps_to_target": steps,
            "seeds_that_reach": len(reached),
            "seconds_to_target": None if steps is None else steps * seconds,
        }

    def cells(self, seconds):
        mean, error, num_seeds = np.mean(self.last), _error(self.last), len(self.runs)
        reached = self.steps_to_target
        steps, time = "not reached", ""
        if len(reached):
            steps = f"{np.mean(reached):.0f} ± {_error(reached):.0f}"
            time = f"{np.mean(reached) * seconds:.2f}"
            if len(reached) < num_seeds:
                steps += f" ({len(reached)} of {num_seeds})"
        return f"{mean:.4f} ± {error:.4f}", str(self.diverged), steps, time


class Row(NamedTuple):
    """A task by a method. `seconds` is of a step; `whole` has the task's budget, `short` a part of it."""

    task: Any
    method: str
    seconds: float
    whole: Runs
    short: Runs | None

    def summary(self):
        """As it is saved."""
        return {
            "task": self.task.name,
            "method": self.method,
            "target": self.whole.target,
            "milliseconds": 1e3 * self.seconds,
            **self.whole.summary(self.seconds),
            "short": None if self.short is None else self.short.summary(self.seconds),
        }


def _error(values):
    """The standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


COLUMNS = ("held-out loss at the end", "diverged", "steps to target", "s to target")


def table(rows):
    """In Markdown, one for each task."""
    lines = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task is task]
        whole, short = of_task[0].whole, of_task[0].short
        columns = ["ms a step", *COLUMNS]
        if short is not None:
            columns += [f"of {short.steps} steps: {COLUMNS[0]}", *COLUMNS[1:]]
        title = f"{task.name}, {whole.steps} steps, {len(whole.runs)} seeds, target {whole.target:.4f}"
        lines += ["\n| " + " | ".join([title, *columns]) + " |", "|---" + "|---:" * len(columns) + "|"]
        for row in of_task:
            parts = (each for each in (row.whole, row.short) if each is not None)
            cells = [cell for each in parts for cell in each.cells(row.seconds)]
            lines.append("| " + " | ".join([row.method, f"{1e3 * row.seconds:.2f}", *cells]) + " |")
        for row in of_task:
            for runs in (each for each in (row.whole, row.short) if each is not None):
                numbers = ", ".join(f"{k} {v:.3g}" for k, v in runs.numbers.items())
                lines.append(f"\n{row.method}, {runs.steps} steps: {numbers}")
    return "\n".join(lines)


def plot(rows):
    """Held-out losses by steps above, and by seconds below; means, with standard errors."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(4 * len(tasks), 7), layout="constrained")  # without pyplot: drawn by Agg, no global state
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        for row in (row for row in rows if row.task is task):
            curves = row.whole.curves
            steps, mean = task.period * np.arange(curves.shape[1]), np.mean(curves, axis=0)
            error = np.std(curves, axis=0) / np.sqrt(len(curves))
            for ax, scale in zip(axes[:, column], (1.0, row.seconds), strict=True):
                [line] = ax.plot(scale * steps, mean, label=row.method)
                ax.fill_between(scale * steps, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0)
        for ax, label in zip(axes[:, column], ("steps", "seconds of steps"), strict=True):
            ax.axhline(next(row.whole.target for row in rows if row.task is task), color="0.5", linewidth=1)
            ax.set(yscale="log", xlabel=label, title=task.name)
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("held-out loss")
    axes[1, 0].set_ylabel("held-out loss")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    return figure


def save(rows, folder):
    """The summaries as `summary.json`, the table as `table.md`, the plots as `curves.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps([row.summary() for row in rows], indent=1))
    (folder / "table.md").write_text(table(rows) + "\n")
    plot(rows).savefig(folder / "curves.png", dpi=120)

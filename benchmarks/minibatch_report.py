"""The table, the summary and the plots of `minibatch.py`."""

import json
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure


class Row(NamedTuple):
    """A task by a method, with the numbers that were chosen. `seconds` is of a step; `short_runs` may be none."""

    task: Any
    method: str
    target: float
    numbers: dict
    seconds: float
    runs: list
    short_runs: list

    @property
    def curves(self):
        """Held-out losses by seed and evaluation."""
        return np.array([run["held_out"] for run in self.runs])

    @property
    def last(self):
        return self.curves[:, -1]

    @property
    def steps_to_target(self):
        """Of the seeds that reach it."""
        reached = self.curves <= self.target
        return self.task.period * np.argmax(reached, axis=1)[np.any(reached, axis=1)]

    @property
    def short_steps(self):
        return self.task.period * (len(self.short_runs[0]["held_out"]) - 1) if self.short_runs else None

    @property
    def diverged(self):
        return int(np.sum(~(self.last <= self.curves[:, 0])))

    def summary(self):
        """As it is saved."""
        reached, short = self.steps_to_target, [run["held_out"][-1] for run in self.short_runs]
        steps = float(np.mean(reached)) if len(reached) else None
        return {
            "task": self.task.name,
            "method": self.method,
            "numbers": self.numbers,
            "target": self.target,
            "milliseconds": 1e3 * self.seconds,
            "last": [float(np.mean(self.last)), _error(self.last)],
            "diverged": self.diverged,
            "steps_to_target": steps,
            "seeds_that_reach": len(reached),
            "seconds_to_target": None if steps is None else steps * self.seconds,
            "shortest_schedule": self.short_steps,
            "shortest_seconds": None if self.short_steps is None else self.short_steps * self.seconds,
            "shortest_last": [float(np.mean(short)), _error(short)] if short else None,
        }


def _error(values):
    """The standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


COLUMNS = (
    "held-out loss at the end | diverged | ms a step | steps to target | s to target | shortest schedule: steps | s | "
    "held-out loss"
)


def _cells(row):
    found, num_seeds = row.summary(), len(row.runs)
    steps = "not reached"
    if found["seeds_that_reach"]:
        steps = f"{found['steps_to_target']:.0f} ± {_error(row.steps_to_target):.0f}"
        if found["seeds_that_reach"] < num_seeds:
            steps += f" ({found['seeds_that_reach']} of {num_seeds})"
    seconds = "" if found["seconds_to_target"] is None else f"{found['seconds_to_target']:.2f}"
    short = ("not reached", "", "")
    if row.short_runs:
        mean, error = found["shortest_last"]
        short = f"{row.short_steps}", f"{found['shortest_seconds']:.2f}", f"{mean:.4f} ± {error:.4f}"
    mean, error = found["last"]
    return f"{mean:.4f} ± {error:.4f}", row.diverged, f"{found['milliseconds']:.2f}", steps, seconds, *short


def table(rows):
    """In Markdown, one for each task."""
    lines = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task is task]
        title = f"{task.name}, {task.steps} steps, {len(of_task[0].runs)} seeds, target {of_task[0].target:.4f}"
        lines += [f"\n| {title} | {COLUMNS} |", "|---" + "|---:" * (COLUMNS.count("|") + 1) + "|"]
        lines += [" | ".join(["| " + row.method, *map(str, _cells(row))]) + " |" for row in of_task]
        lines += [f"\n{row.method}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.numbers.items()) for row in of_task]
    return "\n".join(lines)


def plot(rows):
    """Held-out losses by steps above, and by seconds below; means, with standard errors."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(4 * len(tasks), 7), layout="constrained")  # without pyplot: drawn by Agg, no global state
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        for row in (row for row in rows if row.task is task):
            steps, mean = task.period * np.arange(row.curves.shape[1]), np.mean(row.curves, axis=0)
            error = np.std(row.curves, axis=0) / np.sqrt(len(row.runs))
            for ax, scale in zip(axes[:, column], (1.0, row.seconds), strict=True):
                [line] = ax.plot(scale * steps, mean, label=row.method)
                ax.fill_between(scale * steps, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0)
        for ax, label in zip(axes[:, column], ("steps", "seconds of steps"), strict=True):
            ax.axhline(next(row.target for row in rows if row.task is task), color="0.5", linewidth=1)
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

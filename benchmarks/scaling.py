"""What a step of K-FAC takes on many devices, as a model predicts it: from shapes, and rates of a device.

Run `python benchmarks/scaling.py`; nothing is trained or timed. Bytes, and flops of refreshes and solves, are those of
`kfax.coverage(model, devices=n)`, which `benchmarks/collectives.py` compares with compiled programs. Seconds are these
bytes and flops over the rates of `Device`. The model leaves out that what is sent overlaps with what is computed, that
kernels of small matrices are slower, and that some device is always late. Each device has the same number of examples,
however many devices there are. Columns: state of a device; ms of a step that is neither of the following, of an update
of the statistics, and of a refresh of all inverses; the mean over steps, as a multiple of gradient descent, with these
every 1 and 10, and every 10 and 100 steps; and what takes longest of what K-FAC adds, in the first of these means.
"""

import dataclasses
import math

import equinox as eqx
import jax
from collectives import Transformer

import kfax


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device reaches, in flops, bytes and seconds; about half of what is promised for a GPU of 2023.

    - `flops`: of the model's products, forward and backward, and of statistics.
    - `exact_flops`: of products in full float32, of which a solve consists.
    - `factorization_flops`: of Cholesky decompositions and inverses, of matrices of some thousand rows.
    - `memory`: bandwidth.
    - `node_link`, `link`: what it sends to others in its node, and beyond.
    - `latency`: of each stage of a collective.
    """

    flops: float = 2e14
    exact_flops: float = 3e13
    factorization_flops: float = 5e12
    memory: float = 2e12
    node_link: float = 2e11
    link: float = 4e10
    latency: float = 1e-5
    node: int = 8


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, and what each device has to do for its part of the batch.

    - `model`: tagged.
    - `positions`: of one example, for each layer by path.
    - `examples`: on each device.
    - `between`: flops of one example forward that are not of parameters, such as those of attention.
    """

    model: eqx.Module | list
    positions: dict[str, int]
    examples: int
    between: int = 0

    def costs(self):
        """Flops of the gradient, and of statistics besides: cotangents pulled back once more, and second moments."""
        rows = [row for row in kfax.coverage(self.model).rows if row.layer != "TaggedEmbedding"]
        forward = self.between + sum(2 * row.num_parameters * self.positions[row.path] for row in rows)
        moments = sum(row.update_flops * self.positions[row.path] for row in rows)
        return 3 * forward * self.examples, (forward + moments) * self.examples


def transformer():
    """12 blocks of width 768, each device with 8 texts of 1,024 tokens out of 32,000."""
    model, length = kfax.tag(Transformer(32_000, 768, 12, jax.random.key(0))), 1024
    positions = dict.fromkeys([row.path for row in kfax.coverage(model).rows], length)
    return Workload(model, positions, 8, 12 * 4 * length**2 * 768)


def convnet():
    """The convolutions of ResNet-50 on images of 224 x 224, each device with 64 of them; normalized by groups."""
    layers, sizes, inputs = [], [], 64
    key = jax.random.key(0)

    def add(num_inputs, num_outputs, kernel, side):
        conv = eqx.nn.Conv2d(num_inputs, num_outputs, kernel, use_bias=False, key=key)
        layers.extend([conv, eqx.nn.GroupNorm(32, num_outputs)])
        sizes.extend([side * side] * 2)

    add(3, 64, 7, 112)
    for width, side, depth in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        for i in range(depth):
            add(inputs, width, 1, side)
            add(width, width, 3, side)
            add(width, 4 * width, 1, side)
            if i == 0:
                add(inputs, 4 * width, 1, side)
            inputs = 4 * width
    model = kfax.tag([*layers, eqx.nn.Linear(2048, 1000, key=key)])
    paths = [row.path for row in kfax.coverage(model).rows]
    return Workload(model, dict(zip(paths, [*sizes, 1], strict=True)), 64)


def seconds(device, number, size, rounds):
    """Of sending bytes around a ring of devices, once for a gather and twice for a sum."""
    rate = device.node_link if number <= device.node else device.link
    return rounds * (size * (number - 1) / number / rate + math.ceil(math.log2(number)) * device.latency)


def predict(device, number, shared_by, costs, row):
    """Seconds of the parts of a step: on a number of devices, of which some share out the curvature."""

    def summed(size):
        return seconds(device, number, size, 2)

    def gathered(size):
        return seconds(device, shared_by, size, 1) if size else 0.0

    gradient, statistics = costs
    inverse = max(row.solve_flops / device.exact_flops, row.inverse_bytes / device.memory)
    return {
        "gradient": gradient / device.flops,
        "sum of gradients": summed(row.gradient_summed),
        "parameters": 6 * row.parameter_bytes / device.memory,  # with the velocity: read, and written
        "solve": inverse,
        "gather of solutions": gathered(row.solution_gathered),
        "statistics": statistics / device.flops + 3 * row.statistics_bytes / device.memory,
        "sum of statistics": summed(row.statistics_summed),
        "refresh": row.refresh_flops / device.factorization_flops,
        "gather of inverses": gathered(row.inverses_gathered),
    }


PLAIN = ("gradient", "sum of gradients", "parameters")
UPDATE, REFRESH = ("statistics", "sum of statistics"), ("refresh", "gather of inverses")
PERIODS = ((1, 10), (10, 100))  # of statistics and inverses


def mean(parts, update, refresh):
    """Of a step, over a period, by part."""
    often = dict.fromkeys(parts, 1) | dict.fromkeys(UPDATE, update) | dict.fromkeys(REFRESH, refresh)
    return {name: part / often[name] for name, part in parts.items()}


def main():
    device = Device()
    print(f"{device}\n")
    for name, workload in {"transformer": transformer(), "ResNet-50": convnet()}.items():
        costs = workload.costs()
        plain = "gradient descent"
        print(f"| {name}, devices | curvature | state, GB | a step | statistics | a refresh | 1/10 | 10/100 | limit |")
        print("|---:|---|---:|---:|---:|---:|---:|---:|---|")
        for number in (8, 64, 256, 1024):
            everywhere, within = (kfax.coverage(workload.model, devices=n).devices for n in (number, device.node))
            rows = [(row.setting, number, row) for row in everywhere]
            if number > device.node:
                rows += [(f"{row.setting} in each node", device.node, row) for row in within[1:]]
            alone = predict(device, number, number, costs, everywhere[0])
            base = sum(alone[part] for part in PLAIN)
            state = 2 * everywhere[0].parameter_bytes
            print(f"| {number:,} | none: {plain} | {state / 1e9:.2f} | {1e3 * base:.0f} | | | 1 | 1 | |")
            for setting, shared_by, row in rows:
                parts = predict(device, number, shared_by, costs, row)
                times = [sum(parts[part] for part in parts if part not in UPDATE + REFRESH)]
                times += [sum(parts[part] for part in some) for some in (UPDATE, REFRESH)]
                means = [mean(parts, *periods) for periods in PERIODS]
                ratios = [sum(each.values()) / base for each in means]
                most = max((part for part in parts if part not in PLAIN), key=means[0].__getitem__)
                cells = [f"{1e3 * time:.0f}" for time in times] + [f"{ratio:.2f}" for ratio in ratios]
                print(f"| {number:,} | {setting} | {row.state_bytes / 1e9:.2f} | {' | '.join(cells)} | {most} |")
        print()


if __name__ == "__main__":
    main()

"""What devices send each other in a step, and what each of them factorizes: read from the compiled programs.

Run `python benchmarks/collectives.py`, which takes minutes, or with the names of networks. A step of
`kfax.Optimizer` with a fixed learning rate and momentum is compiled for 2 and 4 CPU devices, for each way to share out
the curvature; nothing is run. Conditionals tell what is done in every step, where statistics are due, and in a refresh.
Bytes are those of what is summed or gathered, as in `kfax.DeviceRow`, and beside them is what
`kfax.coverage(model, devices=n)` says. Flops are counted from the operands of LAPACK's calls, with 2 n³ for a Cholesky
decomposition that becomes an inverse, as `coverage` counts them; of several devices, the most that one computes.
"""

import collections
import dataclasses
import math
import re
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import kfax


SETTINGS = {
    "replicated": lambda placement: kfax.BlockDiagonalCurvature(),
    "Placement": lambda placement: kfax.BlockDiagonalCurvature(placement=placement),
    "PlacedCurvature": lambda placement: kfax.PlacedCurvature(kfax.BlockDiagonalCurvature(), placement),
}
EVERY_STEP, STATISTICS, REFRESH = "every step", "statistics", "refresh"

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_SENDS = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")
_FACTORIZES = re.compile(r"custom-call\(.*lapack_[sd](potrf|syevd)")
_FLOPS = {"potrf": 2, "syevd": 9}


@dataclasses.dataclass(frozen=True)
class Sent:
    """A collective operation: when it is, of which kind, how many bytes each of its arrays has, and how often it is."""

    when: str
    kind: str
    sizes: tuple[int, ...]
    times: int = 1


@dataclasses.dataclass
class Found:
    """What there is in a part of a program: collectives, and flops of factorizations by when they are."""

    sent: list[Sent] = dataclasses.field(default_factory=list)
    flops: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other, times=1):
        self.sent += [dataclasses.replace(each, times=times * each.times) for each in other.sent]
        self.flops.update({when: times * flops for when, flops in other.flops.items()})

    def bytes_of(self, when, kind):
        return sum(each.times * sum(each.sizes) for each in self.sent if (each.when, each.kind) == (when, kind))


def read(text):
    """What is in a compiled step: a `Found`. Of what only some devices do, the most that one of them does."""
    lines, entry, name = {}, None, None
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%(\S+) \(", line)
        if start:
            name = start[2]
            lines[name], entry = [], name if start[1] else entry
        elif name is not None:
            lines[name].append(line)

    def factorizes(name):
        return any(_FACTORIZES.search(line) or any(map(factorizes, _called(line))) for line in lines[name])

    def in_computation(name, when):
        found = Found()
        for line in lines[name]:
            send, factorize, called = _SENDS.search(line), _FACTORIZES.search(line), _called(line)
            if send:
                found.sent.append(Sent(when, send[1], _sizes(line[: send.start()])))
            elif factorize:
                found.flops[when] += _flops(line, factorize[1])
            elif " while(" in line:
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                for each in called:
                    found.add(in_computation(each, when), int(trips[1]) if trips else 1)
            elif " conditional(" in line and re.search(r'op_name="[^"]*shard_map/cond"', line):  # on each device one
                branches = [in_computation(each, when) for each in called]
                assert not any(branch.sent for branch in branches), "devices would wait for each other"
                found.flops[when] += max(branch.flops[when] for branch in branches)
            elif " conditional(" in line:
                costly = any(map(factorizes, called))
                inner = when if when != EVERY_STEP else REFRESH if costly else STATISTICS
                for each in called:  # there is nothing in that which stands for "not due"
                    found.add(in_computation(each, inner))
            elif " call(" in line or " fusion(" in line:
                for each in called:
                    found.add(in_computation(each, when))
        return found

    return in_computation(entry, EVERY_STEP)


def _called(line):
    """The computations that a line calls."""
    if not re.search(r" (call|while|conditional|fusion)\(", line):
        return []
    found = re.findall(r"(?:to_apply|body|calls|true_computation|false_computation)=%([^\s,]+)", line)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
        found += re.findall(r"%([^\s,}]+)", branches)
    return found


def _sizes(text):
    """The bytes of each array of a type."""
    arrays = re.findall(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]", text)
    return tuple(_BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size) for dtype, shape in arrays)


def _flops(line, kind):
    *stack, size, _ = (int(size) for size in re.search(r"[fs]\d+\[([\d,]+)\]", line)[1].split(","))
    return math.prod(stack) * _FLOPS[kind] * size**3


# -- what is compiled --


class Residual(eqx.Module):
    """A block of a transformer: attention to earlier positions, then an MLP, each of its input normalized."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, width, key=keys[0])
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=keys[1])
        self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]

    def __call__(self, x):
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, jnp.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class Transformer(eqx.Module):
    """Blocks in a stack, from tokens to logits."""

    embedding: eqx.nn.Embedding
    blocks: Residual
    head: eqx.nn.Linear

    def __init__(self, vocabulary, width, depth, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(vocabulary, width, key=keys[0])
        self.blocks = eqx.filter_vmap(lambda key: Residual(width, key))(jax.random.split(keys[1], depth))
        self.head = eqx.nn.Linear(width, vocabulary, use_bias=False, key=keys[2])

    def __call__(self, tokens):
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)
        x = jax.vmap(self.embedding)(tokens)
        x, _ = jax.lax.scan(lambda x, block: (eqx.combine(block, rest)(x), None), x, arrays)
        return jax.vmap(self.head)(x)


def autoencoder():
    """That of the benchmarks, its layers a quarter as wide; 64 images."""
    sizes = (196, 250, 125, 62, 8, 62, 125, 250, 196)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    layers = [eqx.nn.Linear(m, n, key=key) for m, n, key in zip(sizes[:-1], sizes[1:], keys, strict=False)]
    between = [layer for each in layers[:-1] for layer in (each, eqx.nn.Lambda(jnp.tanh))]
    images = jax.random.uniform(keys[-1], (64, 196))
    return eqx.nn.Sequential([*between, layers[-1]]), images, images, kfax.sigmoid_cross_entropy


def transformer():
    """Four blocks of width 64 in a stack, 100 tokens; 16 texts of 32."""
    tokens = jax.random.randint(jax.random.key(1), (16, 33), 0, 100)
    return Transformer(100, 64, 4, jax.random.key(0)), tokens[:, :-1], tokens[:, 1:], kfax.softmax_cross_entropy


def compiled_step(model, inputs, targets, loss, mesh, setting):
    """State and program, as text, of a step on a mesh. Statistics are due every 5 steps, a refresh every 10."""
    arrays, rest = eqx.partition(kfax.tag(model), eqx.is_array)
    model = eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())), rest)
    batch = jax.device_put((inputs, targets), NamedSharding(mesh, PartitionSpec("data")))
    estimator = SETTINGS[setting](kfax.Placement(mesh))
    periods = kfax.Preconditioner(estimator, inverse_update_period=10, curvature_update_period=5)

    def loss_fn(model, batch):
        return loss(jax.vmap(model)(batch[0]), batch[1])

    optimizer = kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.9, damping=0.1, preconditioner=periods)
    state = optimizer.init(model, batch)
    lowered = eqx.filter_jit(optimizer.step).lower(model, state, batch, key=jax.random.key(0))
    return state, lowered.compile().compiled.as_text()


def predicted(row):
    """What `coverage` says of a setting, as bytes by when and kind, and flops of a refresh."""
    sent = {
        (EVERY_STEP, "all-reduce"): row.gradient_summed,
        (EVERY_STEP, "all-gather"): row.solution_gathered,
        (STATISTICS, "all-reduce"): row.statistics_summed,
        (REFRESH, "all-gather"): row.inverses_gathered,
    }
    return {key: number for key, number in sent.items() if number}, row.refresh_flops


NETWORKS = {"autoencoder": autoencoder, "transformer": transformer}


def main(*names):
    jax.config.update("jax_num_cpu_devices", 4)
    print("| network | devices | setting | when | kind | operations | arrays | largest, bytes | all | predicted |")
    print("|---|---:|---|---|---|---:|---:|---:|---:|---:|")
    factorized = []
    for name in names or NETWORKS:
        model, *rest = NETWORKS[name]()
        for number in (2, 4):
            mesh = jax.make_mesh((number,), ("data",), devices=jax.devices()[:number])
            for row in kfax.coverage(kfax.tag(model), devices=number).devices:
                _, text = compiled_step(model, *rest, mesh, row.setting)
                found = read(text)
                expected, flops = predicted(row)
                keys = dict.fromkeys([(each.when, each.kind) for each in found.sent] + list(expected))
                for when, kind in sorted(keys):
                    mine = [each for each in found.sent if (each.when, each.kind) == (when, kind)]
                    counts = sum(each.times for each in mine), sum(each.times * len(each.sizes) for each in mine)
                    largest = max((size for each in mine for size in each.sizes), default=0)
                    numbers = (*counts, largest, found.bytes_of(when, kind), expected.get((when, kind), 0))
                    cells = " | ".join(f"{number:,}" for number in numbers)
                    print(f"| {name} | {number} | {row.setting} | {when} | {kind} | {cells} |", flush=True)
                factorized.append((name, number, row.setting, found.flops[REFRESH], flops))
    print("\n| network | devices | setting | flops of factorizations, on the busiest device | predicted |")
    print("|---|---:|---|---:|---:|")
    for name, number, setting, flops, expected in factorized:
        print(f"| {name} | {number} | {setting} | {flops:,} | {expected:,} |")


if __name__ == "__main__":
    main(*sys.argv[1:])

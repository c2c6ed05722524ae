"""What `kfax.coverage` says of several devices, against compiled programs."""

import importlib.util
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import kfax


# The benchmark that reads programs is tested with what it reads.
PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "collectives.py"
SPEC = importlib.util.spec_from_file_location("collectives", PATH)
assert SPEC is not None and SPEC.loader is not None
collectives = sys.modules["collectives"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(collectives)

KEYS = jax.random.split(jax.random.key(0), 4)


class Net(eqx.Module):
    """Layers of several sizes, a stack of six, a normalization."""

    encoder: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    stack: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        self.encoder = eqx.nn.Linear(8, 6, key=KEYS[0])
        self.norm = eqx.nn.LayerNorm(6)
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))(jax.random.split(KEYS[1], 6))
        self.head = eqx.nn.Linear(6, 4, use_bias=False, key=KEYS[2])

    def __call__(self, x):
        x = self.norm(jnp.tanh(self.encoder(x)))
        arrays, rest = eqx.partition(self.stack, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, layer: (x + jnp.tanh(eqx.combine(layer, rest)(x)), None), x, arrays)
        return self.head(x)


def model():
    """With a block that is inverted everywhere: there is nothing to share out of a diagonal."""
    return kfax.set_block(kfax.tag(Net()), lambda net: net.head, kfax.Diagonal())


HEAD = 6 * 4
# Of 2 n³ for each factor. The stack is split into 1, 2, 1 and 2 layers, of which three devices have two each: they are
# the busiest. The fourth has the encoder, of 2 (9³ + 6³), and all that costs little: the most parameters, by six.
MOST = 2 * 2 * (7**3 + 6**3)


@pytest.mark.parametrize("setting", ["Placement", "PlacedCurvature"])
def test_predictions_are_what_the_compiler_made(setting):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    inputs, labels = jax.random.normal(KEYS[3], (8, 8)), jnp.arange(8) % 4
    state, text = collectives.compiled_step(model(), inputs, labels, kfax.softmax_cross_entropy, mesh, setting)
    found = collectives.read(text)
    [row] = [row for row in kfax.coverage(model(), devices=4).devices if row.setting == setting]

    assert found.bytes_of("every step", "all-gather") == row.solution_gathered
    assert found.bytes_of("refresh", "all-gather") == row.inverses_gathered
    assert (row.inverses_gathered > 0) == (setting == "Placement") == (row.solution_gathered == 0)
    # With gradients goes the loss; how many positions there are is known without being summed, one number a matrix.
    assert found.bytes_of("every step", "all-reduce") == row.gradient_summed + 8
    assert found.bytes_of("statistics", "all-reduce") == row.statistics_summed - 8 * (1 + 6)
    # Whether a device failed, and nothing else.
    assert found.bytes_of("refresh", "all-reduce") <= 2
    assert {each.kind for each in found.sent} <= {"all-gather", "all-reduce"}
    assert +found.flops == {"refresh": MOST}
    assert row.refresh_flops == MOST + (HEAD if setting == "Placement" else 0)

    def on_one_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))

    assert on_one_device(state.curvature.average.value) == row.statistics_bytes
    assert on_one_device(state.curvature.inverses) == row.inverse_bytes
    assert on_one_device(state.velocity) == row.parameter_bytes


def test_what_is_sent_goes_around_a_ring():
    rows = {row.setting: row for row in kfax.coverage(model(), devices=4).devices}
    alone, shared, parts = rows["replicated"], rows["Placement"], rows["PlacedCurvature"]
    number = 54 + 12 + 6 * 42 + HEAD
    assert all(row.parameter_bytes == row.gradient_summed == 8 * number for row in rows.values())
    # Each of four devices sends three quarters of a sum twice, and of what is gathered once.
    assert alone.sent_per_step == shared.sent_per_step == 8 * number * 3 // 2
    assert parts.sent_per_step == alone.sent_per_step + 8 * 3 * (54 + 12 + HEAD)
    assert alone.sent_per_refresh == parts.sent_per_refresh == 0
    assert alone.sent_per_update == parts.sent_per_update == alone.statistics_bytes * 3 // 2
    assert shared.state_bytes == alone.state_bytes > parts.state_bytes > 2 * alone.parameter_bytes


def test_devices_are_a_table_of_their_own():
    assert kfax.coverage(model()).devices == ()
    lines = str(kfax.coverage(model(), devices=64)).splitlines()
    head = lines.index("") + 1
    assert lines[head].startswith("each of 64 devices  state")
    assert [line.split()[0] for line in lines[head + 2 :]] == ["replicated", "Placement", "PlacedCurvature"]
    assert str(kfax.coverage(model())) == "\n".join(lines[: head - 1])


def test_a_number_of_devices_that_is_none():
    with pytest.raises(ValueError, match="`devices` must be a whole number, at least 1, got 0"):
        kfax.coverage(model(), devices=0)

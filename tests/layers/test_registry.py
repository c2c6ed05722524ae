"""Tagging whole models, and what is known of them before anything runs."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import MODELS
from helpers import assert_close, parameters

import kfax
from kfax._layers import from_matrices, to_matrices


class Custom(eqx.Module):
    """A user's module with a raw parameter, layers in containers, and things that are no parameters."""

    scale: jax.Array
    layers: dict
    count: jax.Array
    name: str = eqx.field(static=True)
    function: Callable = jnp.tanh

    def __call__(self, x):
        return self.layers["out"](self.function(self.scale * self.layers["blocks"][0](x)))


@pytest.fixture
def custom(key):
    k1, k2 = jax.random.split(key)
    layers = {"blocks": (eqx.nn.Linear(8, 5, key=k1),), "out": eqx.nn.Linear(5, 3, use_bias=False, key=k2)}
    return Custom(jnp.ones(5), layers, jnp.arange(3), "custom")


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_tagged_model_computes_the_same_bits(key, name, use_bias):
    model = MODELS[name](key, use_bias)
    tagged, x = kfax.tag(model), jax.random.normal(key, (7, 8))
    for run in (jax.vmap, lambda m: jax.jit(lambda x: jax.vmap(m)(x))):
        assert jnp.array_equal(run(tagged)(x), run(model)(x))
    assert (
        jax.jit(lambda x: jax.vmap(tagged)(x)).lower(x).as_text()
        == jax.jit(lambda x: jax.vmap(model)(x)).lower(x).as_text()
    )


@pytest.mark.parametrize("name", MODELS)
def test_untag_is_the_inverse_of_tag(key, name):
    model = MODELS[name](key, True)
    assert eqx.tree_equal(kfax.untag(kfax.tag(model)), model)
    assert eqx.tree_equal(kfax.tag(kfax.tag(model)), kfax.tag(model))


@pytest.mark.parametrize("name", MODELS)
def test_files_interchange(key, name, tmp_path):
    model, other = MODELS[name](key, True), MODELS[name](jax.random.fold_in(key, 1), True)
    leaves = zip(jax.tree.leaves(kfax.tag(model)), jax.tree.leaves(model), strict=True)
    assert all(a is b for a, b in leaves if eqx.is_array(a))
    for source, target in [(model, kfax.tag(other)), (kfax.tag(model), other)]:
        eqx.tree_serialise_leaves(tmp_path / "model.eqx", source)
        loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", target)
        assert eqx.tree_equal(kfax.untag(loaded), model)


def test_layers_are_found_wherever_they_sit(custom):
    tagged = kfax.tag(custom, frozen=lambda m: m.scale)
    assert isinstance(tagged.layers["blocks"][0], kfax.TaggedLinear)
    assert isinstance(tagged.layers["out"], kfax.TaggedLinear)
    assert tagged.name == "custom"
    x = jnp.ones(8)
    assert jnp.array_equal(tagged(x), custom(x))


def test_the_outermost_registered_module_is_tagged(key):
    class Wrapper(eqx.Module):
        inner: eqx.nn.Linear

    class TaggedWrapper(kfax.TaggedLayer):
        layer: Wrapper
        block: kfax.Blocks = kfax.KroneckerFactored()
        slots: kfax.Slots = None

        def operations(self) -> dict[str, kfax.Operation]:
            return {"": kfax.Dense(self.layer.inner.weight, self.layer.inner.bias)}

    model = [Wrapper(eqx.nn.Linear(2, 3, key=key)), eqx.nn.Linear(3, 2, key=key)]
    tagged = kfax.tag(model, registry=kfax.default_registry.register(Wrapper, TaggedWrapper))
    assert isinstance(tagged[0], TaggedWrapper)
    assert isinstance(tagged[0].layer.inner, eqx.nn.Linear)
    assert isinstance(tagged[1], kfax.TaggedLinear)


def test_a_layer_tagged_by_hand_keeps_its_block(key):
    by_hand = kfax.TaggedLinear(eqx.nn.Linear(2, 3, key=key), block=kfax.KroneckerFactored(kfax.Reduce()))
    [tagged] = kfax.tag([by_hand])
    assert tagged is by_hand


def test_a_tagged_layer_forwards_what_the_layer_has(key):
    linear = eqx.nn.Linear(2, 3, key=key)
    tagged = kfax.TaggedLinear(linear)
    for name in ("weight", "bias", "in_features", "out_features", "use_bias"):
        assert getattr(tagged, name) is getattr(linear, name)


def test_shared_weights_are_read_through_the_tag(key):
    k1, k2 = jax.random.split(key)
    pair = kfax.tag((eqx.nn.Linear(4, 4, key=k1), eqx.nn.Linear(4, 4, key=k2)))
    shared = eqx.nn.Shared(pair, where=lambda p: p[1].layer.weight, get=lambda p: p[0].weight)
    first, second = shared()
    assert second.weight is first.weight


def test_registry_is_immutable(key):
    before = dict(kfax.default_registry.rules)
    rule = lambda m: kfax.TaggedLinear(m, block=kfax.KroneckerFactored(kfax.Reduce()))  # noqa: E731
    registry = kfax.default_registry.register(eqx.nn.Linear, rule)
    assert kfax.default_registry.rules == before
    assert registry.rules[eqx.nn.Linear] is rule
    with pytest.raises(TypeError):
        registry.rules[eqx.nn.Linear] = rule  # pyright: ignore[reportIndexIssue]
    [tagged] = kfax.tag([eqx.nn.Linear(2, 2, key=key)], registry=registry)
    assert isinstance(tagged.block.sharing, kfax.Reduce)


def test_a_subclass_is_not_taken_for_its_base(key):
    class Other(eqx.nn.Linear):
        """Computes something else with the same parameters."""

        def __init__(self, key):
            super().__init__(2, 3, key=key)

    with pytest.raises(ValueError, match="no curvature block"):
        kfax.tag(Other(key))


def test_matrix_of_a_dense_layer(key):
    tagged = kfax.TaggedLinear(eqx.nn.Linear(4, 3, key=key))
    expected = jnp.concatenate([tagged.weight, tagged.bias[:, None]], axis=1)
    assert_close(to_matrices(tagged), {"": expected})
    assert eqx.tree_equal(from_matrices(tagged, {"": 2 * expected}), jax.tree.map(lambda x: 2 * x, tagged))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_part_drops_out_of_the_matrix(key, frozen):
    model = kfax.tag(eqx.nn.Linear(4, 3, key=key))
    rows = kfax.coverage(model, frozen=lambda m: getattr(m, frozen)).rows
    assert [name for name, _ in rows[0].parameters] == [{"weight": "bias", "bias": "weight"}[frozen]]
    assert rows[0].num_parameters == {"weight": 3, "bias": 12}[frozen]


def test_coverage_as_data(custom):
    coverage = kfax.coverage(kfax.tag(custom, frozen=lambda m: m.scale))
    assert [row.path for row in coverage.rows] == [".scale", ".layers['blocks'][0]", ".layers['out']"]
    assert coverage.missing == (".scale",)
    scale, first, last = coverage.rows
    assert (scale.layer, scale.block) == (None, None)
    assert (first.layer, first.block) == ("TaggedLinear", "KroneckerFactored(Expand())")
    assert first.parameters == (("weight", (5, 8)), ("bias", (5,)))
    assert first.num_parameters == 45
    # Statistics A, G and R, and the two inverses.
    assert first.num_bytes == 8 * (2 * (9 * 9 + 5 * 5) + 1)
    assert last.num_bytes == 8 * (2 * (5 * 5 + 3 * 3) + 1)
    assert first.refresh_flops == 2 * (9**3 + 5**3)
    frozen = kfax.coverage(kfax.tag(custom, frozen=lambda m: m.scale), frozen=lambda m: [m.scale, m.layers["out"]])
    assert [row.block for row in frozen.rows] == ["frozen", first.block, "frozen"]
    assert frozen.missing == ()


def test_coverage_predicts_the_state_and_runs_nothing(key):
    model = kfax.tag(MODELS["mlp-scan"](key, True))
    state = kfax.BlockDiagonalCurvature().init(model)
    leaves = jax.tree.leaves((state.average.value, state.inverses))
    assert sum(row.num_bytes for row in kfax.coverage(model).rows) == sum(leaf.nbytes for leaf in leaves)
    assert sum(row.num_parameters for row in kfax.coverage(model).rows) == sum(
        leaf.size for leaf in jax.tree.leaves(parameters(model))
    )


def test_coverage_as_a_table(custom):
    text = str(kfax.coverage(custom))
    assert text.count("NONE: `kfax.tag` the model") == 4
    lines = str(kfax.coverage(kfax.tag(custom, frozen=lambda m: m.scale), frozen=lambda m: m.scale)).splitlines()
    assert lines[0].split() == ["path", "parameters", "layer", "block", "state", "update/row", "refresh", "solve"]
    assert "frozen" in lines[2]
    assert ".layers['out']" in lines[4]
    assert lines[-1].startswith("total") and "60" in lines[-1]


def test_coverage_says_that_a_batch_normalization_mixes_examples(key):
    norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
    model = kfax.tag(eqx.nn.Sequential([eqx.nn.Linear(2, 3, key=key), norm]))
    assert "Examples see each other by `.layers[1]`" in str(kfax.coverage(model))
    assert "Examples see" not in str(kfax.coverage(kfax.tag(eqx.nn.Linear(2, 3, key=key))))

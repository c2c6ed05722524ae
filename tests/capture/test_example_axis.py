"""What `check` finds out by values: whether the axis of the examples is theirs, and whether they see each other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, parameters
from jax.flatten_util import ravel_pytree

import kfax


N, D = 6, 4


class Positions(eqx.Module):
    """A table of learned positions, which is the same for every example, and a head."""

    table: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.head)(jnp.tanh(x + jax.vmap(self.table)(jnp.arange(len(x)))))


class MaskedPositions(eqx.Module):
    table: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __call__(self, x, present):
        p = jax.vmap(lambda i, m: kfax.masked(self.table, m)(i))(jnp.arange(len(x)), present)
        return jax.vmap(self.head)(jnp.tanh(x + p))


def make(kind, number, key):
    k1, k2 = jax.random.split(key)
    return kfax.tag(kind(eqx.nn.Embedding(number, D, key=k1), eqx.nn.Linear(D, 3, key=k2)))


def table_block(loss_fn, model, batch, name):
    """The full block of the table, exactly and by kfax."""
    full = kfax.set_block(model, ".table", kfax.Full())
    estimator = kfax.BlockDiagonalCurvature(kfax.ExactGGN(), example_axis=name)
    state = estimator.update(estimator.init(full), loss_fn, full, batch)
    size = model.table.weight.size
    return estimator.to_dense(state, kfax.parameters_of(full))[:size, :size]


def dense_block(loss_fn, model, batch):
    """The generalized Gauss-Newton matrix of a softmax of 3 classes in the table, by `jax.jacrev`."""

    def outputs(weight):
        moved = eqx.tree_at(lambda m: m.table.layer.weight, model, weight)
        return loss_fn(moved, batch).outputs

    weight = model.table.weight
    jacobian = jax.jacrev(outputs)(weight).reshape(-1, 3, weight.size)
    p = jax.nn.softmax(outputs(weight)).reshape(-1, 3)
    hessian = jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(p)
    mask = loss_fn(model, batch).weighting.mask
    if mask is not None:
        hessian = hessian * mask.reshape(-1)[:, None, None]
    return jnp.einsum("nki,nkl,nlj->ij", jacobian, hessian, jacobian) / len(batch[0] if mask is not None else batch)


def test_a_position_table_with_as_many_positions_as_examples(key):
    model, x = make(Positions, N, key), jax.random.normal(key, (N, N, D))

    def loss_of(name):
        return lambda model, x: kfax.softmax_cross_entropy(jax.vmap(model, axis_name=name)(x), jnp.zeros((N, N), int))

    message = r"Around `\.table`, the outermost mapped axis does not enumerate the examples.*axis_name=\"batch\""
    with pytest.raises(ValueError, match=message):
        kfax.check(loss_of(None), model, x)
    with pytest.raises(ValueError, match=message):
        kfax.full_batch(loss_of(None)).init(model, x)
    kfax.check(loss_of("batch"), model, x, example_axis="batch")
    assert_close(table_block(loss_of("batch"), model, x, "batch"), dense_block(loss_of("batch"), model, x))


def test_a_masked_layer_that_is_the_same_for_every_example(key):
    model, x = make(MaskedPositions, 5, key), jax.random.normal(key, (N, 5, D))
    present = jnp.arange(5) < jnp.array([5, 3, 2, 4, 1, 5])[:, None]

    def loss_of(name):
        return lambda model, batch: kfax.softmax_cross_entropy(
            jax.vmap(model, axis_name=name)(*batch), jnp.zeros((N, 5), int), mask=batch[1]
        )

    for name in (None, "batch"):  # the mask tells the examples apart
        kfax.check(loss_of(name), model, (x, present), example_axis=name)
        found = table_block(loss_of(name), model, (x, present), name)
        assert_close(found, dense_block(loss_of(name), model, (x, present)))


def sequence_first(name, inner):
    """A model mapped over positions outside and over examples inside."""

    def loss_fn(model, x):
        outputs = jax.vmap(jax.vmap(model, axis_name=inner), axis_name=name)(x)
        return kfax.squared_error(jnp.moveaxis(jnp.tanh(outputs), 0, 1), jnp.zeros((N, N, 2)))

    return loss_fn


@pytest.mark.parametrize(
    ("names", "axis", "found"),
    [
        ((None, None), None, "the outermost mapped axis"),
        (("positions", "batch"), "positions", "the axis named 'positions'"),
        (("positions", "batch"), "batch", None),
    ],
)
def test_another_axis_of_the_same_length(key, names, axis, found):
    model = kfax.tag(eqx.nn.Linear(D, 2, key=key))
    x = jax.random.normal(key, (N, N, D))  # positions first
    # The batch itself has its examples on axis 0, so that kfax can leave some out.
    loss_fn = lambda model, batch: sequence_first(*names)(model, jnp.moveaxis(batch, 1, 0))  # noqa: E731
    if found is None:
        kfax.check(loss_fn, model, x, example_axis=axis)
        return
    with pytest.raises(ValueError, match=f"{found} does not enumerate the examples"):
        kfax.check(loss_fn, model, x, example_axis=axis)


def test_a_named_axis_may_be_seen_in_parts(key):
    """Of such a layer the axis cannot be checked, but what is done with its weights can."""
    model, x = kfax.tag(eqx.nn.Linear(D, 2, key=key)), jax.random.normal(key, (N, D))

    def loss_of(run):
        def loss_fn(model, x):
            outputs = jax.lax.map(jax.vmap(lambda z: run(model, z), axis_name="batch"), x.reshape(2, N // 2, D))
            return kfax.squared_error(outputs.reshape(N, -1), jnp.zeros((N, 2)))

        return loss_fn

    kfax.check(loss_of(lambda model, z: model(z)), model, x, example_axis="batch")
    with pytest.raises(ValueError, match="behind its tag's back"):
        kfax.check(loss_of(lambda model, z: model(z) + model.weight @ z), model, x, example_axis="batch")


# -- examples that see each other --


def contrastive(name):
    """Negatives within the batch."""

    def loss_fn(model, batch):
        a, b = (jax.vmap(model, axis_name=name)(x) for x in batch)
        return kfax.softmax_cross_entropy(a @ b.T, jnp.arange(N))

    return loss_fn


def centered(name):
    """Each example has the mean of all subtracted, as by a batch normalization."""

    def loss_fn(model, batch):
        outputs = jnp.tanh(jax.vmap(model, axis_name=name)(batch[0]))
        return kfax.squared_error(outputs - jnp.mean(outputs, axis=0), jnp.zeros(outputs.shape))

    return loss_fn


@pytest.mark.parametrize("make", [contrastive, centered])
def test_examples_that_see_each_other_are_found(key, make):
    model, batch = kfax.tag(eqx.nn.Linear(D, 3, key=key)), tuple(jax.random.normal(key, (2, N, D)))
    with pytest.warns(UserWarning, match="Examples see each other.*outermost mapped axis is theirs.*Name the axis"):
        kfax.check(make(None), model, batch)
    with pytest.warns(UserWarning, match="Examples see each other.*which exact estimators have.$"):
        kfax.check(make("batch"), model, batch, example_axis="batch")


def test_what_cannot_be_told_is_said(key):
    """The data are not in the batch, so that kfax cannot leave some out."""
    model, batch = kfax.tag(eqx.nn.Linear(D, 3, key=key)), tuple(jax.random.normal(key, (2, N, D)))
    with pytest.raises(ValueError, match="does not enumerate the examples"):
        kfax.check(lambda model, _: contrastive(None)(model, batch), model, None)
    with pytest.warns(UserWarning, match="Examples see each other"):
        kfax.check(lambda model, _: contrastive("batch")(model, batch), model, None, example_axis="batch")


# -- what `loss_fn` sees of slots --


def sum_of(leaves):
    w = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
    return jnp.mean(w**2) + jnp.mean(jnp.sqrt(w**2 + 1))


def penalized(choose):
    def loss_fn(model, batch):
        return [kfax.squared_error(jax.vmap(model)(batch), batch[:, :3]), kfax.Penalty(sum_of(choose(model)))]

    return loss_fn


def inexact(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


def of_parameters(model):
    return jax.tree.leaves(kfax.parameters_of(model))


def stacked(key):
    """Three layers in a scan."""
    return eqx.nn.MLP(D, 3, D, 3, activation=jnp.tanh, scan=True, key=key)


MLP = lambda key: eqx.nn.MLP(D, 3, D, 3, activation=jnp.tanh, key=key)  # noqa: E731


@pytest.mark.parametrize(("make", "choose"), [(MLP, inexact), (MLP, of_parameters), (stacked, of_parameters)])
def test_a_penalty_of_all_arrays_sees_no_slots(key, make, choose):
    model, x = kfax.tag(make(key)), jax.random.normal(key, (N, D))
    loss_fn = penalized(choose)

    def objective(p):
        whole = eqx.combine(p, eqx.filter(model, eqx.is_inexact_array, inverse=True))
        outputs = jax.vmap(whole)(x)
        return jnp.mean(jnp.sum(jnp.square(outputs - x[:, :3]), axis=1)) + sum_of(jax.tree.leaves(p))

    optimizer = kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.0, damping=1.0)
    state = optimizer.init(model, x)
    _, _, info = eqx.filter_jit(optimizer.step)(model, state, x, key=key)
    p = parameters(model)
    assert_close(info.loss, objective(p))
    assert_close(info.gradient_norm, jnp.linalg.norm(ravel_pytree(jax.grad(objective)(p))[0]))


def test_a_penalty_that_sees_the_slots_of_stacked_layers_is_found(key):
    model, x = kfax.tag(stacked(key)), jax.random.normal(key, (N, D))
    with pytest.raises(ValueError, match=r"while kfax observes the layers.*`kfax\.parameters_of\(model\)`"):
        kfax.check(penalized(inexact), model, x)


def test_a_model_has_no_more_leaves_within_the_loss(key):
    model, x = kfax.tag(MLP(key)), jax.random.normal(key, (N, D))
    structures = []

    def loss_fn(model, x):
        structures.append(jax.tree.structure(kfax.parameters_of(model)))
        assert len(jax.tree.leaves(model)) == len(jax.tree.leaves(kfax.untag(model)))
        return kfax.squared_error(jax.vmap(model)(x), x[:, :3])

    kfax.check(loss_fn, model, x)
    assert len(structures) > 1
    assert set(structures) == {jax.tree.structure(kfax.parameters_of(model))}

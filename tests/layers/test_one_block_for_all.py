"""`kfax.tag(model, block=...)`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import kfax


class Everything(eqx.Module):
    """A layer of every kind of operation."""

    embedding: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    cell: eqx.nn.GRUCell
    act: eqx.nn.PReLU
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(5, 4, key=keys[0])
        self.norm = eqx.nn.LayerNorm(4)
        self.cell = eqx.nn.GRUCell(4, 3, key=keys[1])
        self.act = eqx.nn.PReLU()
        self.head = eqx.nn.Linear(3, 2, key=keys[2])

    def __call__(self, i):
        x = self.norm(self.embedding(i))
        return self.head(self.act(self.cell(x, jnp.tanh(x[:3]))))


MODEL = Everything(jax.random.key(0))
EIGH = kfax.KroneckerFactored(kfax.Reduce(), inversion=kfax.Eigh())


def blocks_of(model):
    return {row.path: row.block for row in kfax.coverage(model).rows}


def test_a_kronecker_block_for_all_that_have_inputs():
    found = blocks_of(kfax.tag(MODEL, block=EIGH))
    assert found.pop(".norm") == found.pop(".act") == str(kfax.UnitWise())
    assert set(found) == {".embedding", ".cell/input", ".cell/hidden", ".cell/candidate", ".head"}
    assert set(found.values()) == {str(EIGH)}


@pytest.mark.parametrize("block", [kfax.Diagonal(), kfax.UnitWise(), kfax.Full(), kfax.KLOptimal(), EIGH])
def test_the_block_is_used_by_all_that_have_it(block):
    model = kfax.tag(MODEL, block=block)
    found = blocks_of(model)
    if block is not EIGH:
        assert set(found.values()) == {str(block)}

    def loss_fn(model, batch):
        return kfax.squared_error(jax.vmap(model)(batch), jnp.ones((6, 2)))

    optimizer = kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.9, damping=0.1)
    batch = jnp.arange(6) % 5
    state = optimizer.init(model, batch)
    _, _, info = eqx.filter_jit(optimizer.step)(model, state, batch, key=jax.random.key(0))
    assert info.result == kfax.StepResult.successful


def test_layers_that_are_tagged_already_keep_theirs():
    by_hand = eqx.tree_at(lambda m: m.head, MODEL, kfax.TaggedLinear(MODEL.head, block=kfax.Full()))
    found = blocks_of(kfax.tag(by_hand, block=kfax.Diagonal()))
    assert found[".head"] == str(kfax.Full()) and found[".norm"] == str(kfax.Diagonal())

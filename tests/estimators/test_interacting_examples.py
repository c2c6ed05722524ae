"""What each source estimates where examples see each other: the second moment of each example's own rows."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import kfax


N, D, K = 5, 3, 4
DRAWS = 4000


def contrastive(outputs):
    """Logits of negatives within the batch."""
    return outputs @ jnp.roll(outputs, 1, axis=1).T


def loss_fn(model, x):
    return kfax.softmax_cross_entropy(contrastive(jnp.tanh(jax.vmap(model, axis_name="batch")(x))), jnp.arange(N))


def case():
    keys = jax.random.split(jax.random.key(0))
    layer = eqx.nn.Linear(D, K, key=keys[0])
    return layer, kfax.tag(layer), jax.random.normal(keys[1], (N, D))


def own_rows(layer, x, factor):
    """`(1/N) Σ_n Σ_m J_nmᵀ F_m F_mᵀ J_nm`, with J_nm of the outputs of example m in a copy of the weights for n.

    And the same with two sums over n, which is the whole matrix.
    """

    def outputs(copies):
        return contrastive(jnp.tanh(jax.vmap(lambda wb, z: wb[:, :-1] @ z + wb[:, -1])(copies, x)))

    v = jnp.concatenate([layer.weight, layer.bias[:, None]], axis=1)
    jacobian = jax.jacrev(outputs)(jnp.broadcast_to(v, (N, *v.shape))).reshape(N, N, N, v.size)  # m, output, n
    pulled = jnp.einsum("mknp,mkf->mfnp", jacobian, factor(outputs(jnp.broadcast_to(v, (N, *v.shape)))))
    return jnp.einsum("mfnp,mfnq->pq", pulled, pulled) / N, jnp.einsum("mfnp,mfoq->pq", pulled, pulled) / N


def softmax_factor(logits):
    p = jax.nn.softmax(logits)
    return jax.vmap(lambda q: jnp.linalg.cholesky(jnp.diag(q) - jnp.outer(q, q) + 1e-12 * jnp.eye(len(q))))(p)


def gradient_factor(logits):
    return (jax.nn.softmax(logits) - jnp.eye(N))[..., None]


SOURCES = [
    (kfax.ExactGGN(), softmax_factor),
    (kfax.ExactFisher(), softmax_factor),
    (kfax.EmpiricalFisher(), gradient_factor),
    (kfax.CurvaturePropagation(), softmax_factor),
    (kfax.SampledFisher(), softmax_factor),
]


@pytest.mark.parametrize(("source", "factor"), SOURCES, ids=lambda x: type(x).__name__)
def test_sources_estimate_the_part_within_examples(source, factor):
    layer, model, x = case()
    model = kfax.set_block(model, lambda m: m, kfax.Full())
    estimator = kfax.BlockDiagonalCurvature(source, example_axis="batch")

    def one(key):
        state = estimator.update(estimator.init(model), loss_fn, model, x, key=key)
        return state.average.value[""]

    draws = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(1), DRAWS))
    expected, whole = own_rows(layer, x, factor)
    # Five standard errors of the mean of the draws, with a little for the 1e-12 in the factor.
    error = jnp.std(draws, axis=0) / jnp.sqrt(DRAWS)
    assert jnp.all(jnp.abs(jnp.mean(draws, axis=0) - expected) <= 5 * error + 1e-9)
    # The whole matrix, with the products of rows of different examples, is another one.
    assert jnp.abs(jnp.trace(expected) - jnp.trace(whole)) > 0.1 * jnp.trace(expected)


@pytest.mark.parametrize("source", [kfax.ExactGGN(), kfax.ExactFisher(), kfax.EmpiricalFisher()])
def test_signs_change_nothing_for_examples_apart(source):
    _, model, x = case()
    estimator = kfax.BlockDiagonalCurvature(source)
    apart = lambda model, x: kfax.softmax_cross_entropy(jax.vmap(model)(x), jnp.arange(N) % K)  # noqa: E731
    factors = [
        estimator.update(estimator.init(model), apart, model, x, key=key).average.value
        for key in (None, jax.random.key(0), jax.random.key(7))
    ]
    for other in factors[1:]:
        assert all(map(jnp.array_equal, jax.tree.leaves(factors[0]), jax.tree.leaves(other)))

"""Two factorizing estimators in one program, which XLA runs at the same time, must not wait for each other forever."""

import subprocess
import sys


PROGRAM = """
import equinox as eqx, jax, jax.numpy as jnp, kfax

jax.config.update("jax_enable_x64", True)
keys = jax.random.split(jax.random.key(0), 2)
layers = [eqx.nn.Linear(14, 8, key=keys[0]), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(8, 14, key=keys[1])]
model = kfax.tag(eqx.nn.Sequential(layers))
batch = jax.random.bernoulli(jax.random.key(1), 0.5, (32, 14)).astype(float)
loss_fn = lambda model, x: kfax.sigmoid_cross_entropy(jax.vmap(model)(x), x)
parameters = kfax.parameters_of(model)
gradient = eqx.filter(eqx.filter_grad(lambda m: loss_fn(m, batch).value())(model), eqx.is_inexact_array)


@eqx.filter_jit
def run(model, dampings):
    found = []
    for inversion in (kfax.Cholesky(), kfax.Eigh()):
        estimator = kfax.ExplicitExactCurvature(kfax.ExactGGN(), inversion=inversion)
        state = estimator.update(estimator.init(model), loss_fn, model, batch)
        solve = lambda damping, e=estimator, s=state: e.solve(e.refresh(s, parameters, damping), gradient)
        found.append(jax.vmap(solve)(dampings))
    return found


for i in range(300):
    jax.block_until_ready(run(model, jnp.asarray([1e-3, 0.1, 10.0]) + i * 1e-4))
    print(i, flush=True)
"""


def test_two_factorizing_estimators_in_one_program():
    """Before matrices were factorized one by one on the CPU, this hung within the first runs on two cores."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "299"

"""The ground state of the helium atom by variational Monte Carlo: natural gradients in sample space against Adam.

Needs `pip install -e '.[examples]'`, and some minutes on two cores. Prints a table, and saves a plot. The wavefunction
is a small network times what satisfies the cusp conditions, and is not tagged. 512 walkers are moved by Metropolis
steps; their local energies come into the loss with the batch. The exact energy is -2.90372 hartree.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Column, Table

import kfax


EXACT, NUM_WALKERS, SWEEPS, STRIDE = -2.90372, 512, 15, 0.35
METHODS = {"SPRING": "#0072B2", "Adam": "#D55E00"}


class Wavefunction(eqx.Module):
    """log |ψ| of two electrons, `(2, 3)`, that may be exchanged: smooth functions of the distances, and cusps."""

    network: eqx.nn.MLP

    def __call__(self, electrons):
        first, second = jnp.linalg.norm(electrons, axis=1)
        apart = jnp.linalg.norm(electrons[0] - electrons[1])
        smooth = [r**2 / (1 + r) for r in (first, second, apart)]
        orders = jnp.array([smooth, [smooth[1], smooth[0], smooth[2]]])
        return jnp.sum(jax.vmap(self.network)(orders)) - 2 * (first + second) + apart / (2 + apart)


def local_energy(model, electrons):
    """`-(∇² log ψ + |∇ log ψ|²) / 2 + V`, by two derivatives in forward mode along each coordinate."""

    def along(direction):
        slope = lambda x: jax.jvp(model, (x,), (direction,))[1]  # noqa: E731
        return jax.jvp(slope, (electrons,), (direction,))

    slopes, bends = jax.vmap(along)(jnp.eye(6).reshape(6, 2, 3))
    distances = jnp.linalg.norm(electrons, axis=1)
    potential = 1 / jnp.linalg.norm(electrons[0] - electrons[1]) - jnp.sum(2 / distances)
    return potential - (jnp.sum(bends) + jnp.sum(slopes**2)) / 2


def loss_fn(model, batch):
    return kfax.energy_loss(jax.vmap(model)(batch[0]), batch[1])


@eqx.filter_jit
def move(model, walkers, key):
    """Metropolis steps, and the local energies where they end."""

    def sweep(walkers, key):
        step_key, accept_key = jax.random.split(key)
        moved = walkers + STRIDE * jax.random.normal(step_key, walkers.shape)
        ratio = 2 * (jax.vmap(model)(moved) - jax.vmap(model)(walkers))
        accepted = jnp.log(jax.random.uniform(accept_key, ratio.shape)) < ratio
        return jnp.where(accepted[:, None, None], moved, walkers), None

    walkers, _ = jax.lax.scan(sweep, walkers, jax.random.split(key, SWEEPS))
    return walkers, jax.vmap(lambda electrons: local_energy(model, electrons))(walkers)


def spring(model, batch):
    optimizer = kfax.Optimizer(
        loss_fn,
        learning_rate=kfax.NormConstraint(lambda step: 0.1 / (1 + step / 100), 1e-2),
        momentum=kfax.ProjectedMomentum(0.95),
        damping=1e-3,
        preconditioner=kfax.Preconditioner(kfax.SampleSpaceCurvature(centered=True), inverse_update_period=1),
    )
    step = eqx.filter_jit(optimizer.step)
    return optimizer.init(model, batch), lambda model, state, batch: step(model, state, batch)[:2]


def adam(model, _):
    """With the same gradients. Of 1e-3, 3e-3, 1e-2 and 3e-2 the rate with the lowest variance."""
    optim = optax.adam(3e-2)

    @eqx.filter_jit
    def step(model, state, batch):
        gradients = eqx.filter_grad(lambda model: kfax.value(loss_fn(model, batch)))(model)
        updates, state = optim.update(gradients, state)
        return eqx.apply_updates(model, updates), state

    return optim.init(eqx.filter(model, eqx.is_array)), step


def train(make, seed, num_steps, advance):
    """Mean and variance of the local energies at each step, and of many more walkers at the end."""
    model_key, start_key, key = jax.random.split(jax.random.key(seed), 3)
    model = Wavefunction(eqx.nn.MLP(3, "scalar", 32, 2, jnp.tanh, key=model_key))
    walkers = jax.random.normal(start_key, (NUM_WALKERS, 2, 3))
    walkers, energies = move(model, walkers, start_key)
    (state, step), history, last = make(model, (walkers, energies)), [], []
    for i in range(num_steps):
        walkers, energies = move(model, walkers, jax.random.fold_in(key, i))
        history.append((energies.mean(), energies.var()))
        model, state = step(model, state, (walkers, energies))
        advance()
    for i in range(max(num_steps // 2, 1)):
        walkers, energies = move(model, walkers, jax.random.fold_in(start_key, i))
        last.append(energies)
    return np.array(history), np.concatenate(last)


def plot(histories, path):
    figure = Figure(figsize=(6, 4), layout="constrained")  # without pyplot: drawn by Agg, and no global state
    ax = figure.subplots()
    for name, seed, history in histories:
        ax.plot(history[:, 1], color=METHODS[name], label=None if seed else name)
    ax.set(yscale="log", xlabel="step", ylabel="variance of the local energy [hartree²]")
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=pathlib.Path, default="examples/output/helium.png")
    parser.add_argument("--smoke", action="store_true", help="only a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    num_steps, num_seeds = (3, 1) if options.smoke else (options.steps, 3)

    table = Table("method", *(Column(name, justify="right") for name in ("seed", "energy", "error", "variance")))
    histories = []
    with Progress() as progress:
        bar = progress.add_task("training", total=2 * num_seeds * num_steps)
        for name, make in zip(METHODS, (spring, adam), strict=True):
            for seed in range(num_seeds):
                history, last = train(make, seed, num_steps, lambda: progress.advance(bar))
                histories.append((name, seed, history))
                table.add_row(name, f"{seed}", f"{last.mean():.4f}", f"{last.mean() - EXACT:+.4f}", f"{last.var():.4f}")
    plot(histories, options.output)
    rich.print(table)


if __name__ == "__main__":
    main()

"""Whether 25 steps of kfax are those of kfac-jax, with the same network, data and settings, in float64.

Needs an environment of its own, since kfac-jax 0.0.8 does not run with newer versions of JAX:

    pip install "jax==0.9.*" "kfac-jax==0.0.8" -e . && python benchmarks/kfac_jax_agreement.py
"""

import jax


jax.config.update("jax_enable_x64", True)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import kfac_jax  # noqa: E402
import numpy as np  # noqa: E402

import kfax  # noqa: E402


STEPS, L2, SIZES = 25, 1e-3, (12, 10, 6, 10, 12)
AUTO, EXACT = kfax.QuadraticModel(), kfax.BlockDiagonalCurvature(kfax.ExactGGN(), decay=0.95)
LM = kfax.LevenbergMarquardt(1.0, decay=0.9, period=5)
ADAPTIVE = {"learning_rate": AUTO, "momentum": AUTO, "damping": LM}
FIXED = {"learning_rate": kfax.LossConstraint(0.05, jnp.inf), "momentum": 0.8, "damping": 0.2}
THEIR_ADAPTIVE = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "initial_damping": 1.0,
    "damping_adaptation_decay": 0.9,
    "damping_adaptation_interval": 5,
}
THEIR_FIXED = {
    "learning_rate_schedule": lambda step: 0.05,
    "momentum_schedule": lambda step: 0.8,
    "damping_schedule": lambda step: 0.2,
}
# Name: settings of kfax, whether blocks are inverted by their eigenvectors, settings of kfac-jax.
ROWS = {
    "everything adaptive": (ADAPTIVE, False, THEIR_ADAPTIVE),
    "fixed coefficients": (FIXED, False, THEIR_FIXED),
    "norm constraint": (
        FIXED | {"learning_rate": kfax.NormConstraint(0.5, 1e-3)},
        False,
        THEIR_FIXED | {"learning_rate_schedule": lambda step: 0.5, "norm_constraint": 1e-3},
    ),
    "exact inverses, adaptive": (ADAPTIVE, True, THEIR_ADAPTIVE | {"use_exact_inverses": True}),
    "exact inverses, fixed": (FIXED, True, THEIR_FIXED | {"use_exact_inverses": True}),
}


def data():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(o, i)) / np.sqrt(i) for i, o in zip(SIZES[:-1], SIZES[1:], strict=True)]
    biases = [0.1 * rng.normal(size=o) for o in SIZES[1:]]
    x = jnp.asarray(rng.uniform(size=(80, SIZES[0])))
    return [(jnp.asarray(w), jnp.asarray(b)) for w, b in zip(weights, biases, strict=True)], x


def run_kfax(settings, is_exact, layers, x):
    linear = [eqx.nn.Linear(w.shape[1], w.shape[0], key=jax.random.key(0)) for w, _ in layers]
    linear = [eqx.tree_at(lambda m: (m.weight, m.bias), m, layer) for m, layer in zip(linear, layers, strict=True)]
    model = [each for m in linear for each in (m, eqx.nn.Lambda(jnp.tanh))][:-1]
    block = kfax.KroneckerFactored(inversion=kfax.Eigh() if is_exact else kfax.Cholesky())
    registry = kfax.default_registry.register(eqx.nn.Linear, lambda m: kfax.TaggedLinear(m, block=block))
    model = kfax.tag(eqx.nn.Sequential(model), registry=registry)

    def loss_fn(model, batch):
        return kfax.sigmoid_cross_entropy(jax.vmap(model)(batch), batch)

    optimizer = kfax.Optimizer(
        loss_fn, **settings, l2=L2, preconditioner=kfax.Preconditioner(EXACT, inverse_update_period=5)
    )
    state, step, rows = optimizer.init(model, x), eqx.filter_jit(optimizer.step), []
    for _ in range(STEPS):
        model, state, info = step(model, state, x)
        rows.append((info.loss, info.damping, info.reduction_ratio, info.learning_rate, info.momentum))
    return np.array(rows, dtype=float)


def run_kfac_jax(settings, layers, x):
    params = [(jnp.array(w.T), jnp.array(b)) for w, b in layers]  # its steps delete what they are given

    def value(params, x):
        h = x
        for w, b in params[:-1]:
            h = jnp.tanh(h @ w + b)
        logits = h @ params[-1][0] + params[-1][1]
        kfac_jax.register_sigmoid_cross_entropy_loss(logits, x)
        loss = jnp.mean(jnp.sum(jnp.logaddexp(0, logits) - x * logits, axis=1))
        return loss + L2 / 2 * sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(value),
        l2_reg=L2,
        estimation_mode="ggn_exact",
        num_burnin_steps=0,
        curvature_ema=0.95,
        inverse_update_period=5,
        **settings,
    )
    key = jax.random.key(0)
    state, rows = optimizer.init(params, key, x), []
    for i in range(STEPS):
        params, state, stats = optimizer.step(params, state, key, batch=x, global_step_int=i)
        names = ("loss", "damping", "rho", "learning_rate", "momentum")
        rows.append([float(stats.get(name, np.nan)) for name in names])
    rows = np.array(rows)
    if "norm_constraint" in settings:
        rows[:, 3] = np.nan  # kfac-jax reports the learning rate before it is lowered, kfax the one that was used
    return rows


def main():
    layers, x = data()
    print(f"| largest relative difference in {STEPS} steps | loss | λ | ρ | α | β | loss after |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (settings, is_exact, theirs) in ROWS.items():
        mine, other = run_kfax(settings, is_exact, layers, x), run_kfac_jax(theirs, layers, x)
        both = np.isfinite(mine) & np.isfinite(other) & ((mine != 0) | (other != 0))
        gaps = np.where(both, np.abs(mine - other) / np.where(both, np.maximum(np.abs(mine), 1e-300), 1), 0)
        cells = [f"{gap:.0e}" if np.any(both[:, i]) else "" for i, gap in enumerate(gaps.max(axis=0))]
        print(f"| {name} | {' | '.join(cells)} | {mine[-1, 0]:.6f} |", flush=True)
        assert gaps.max() < 1e-6, (mine, other)


if __name__ == "__main__":
    main()

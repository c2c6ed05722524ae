"""A right call of each callable that users call, by names of arguments: `bad_input.py` puts wrong ones into it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

import kfax


KEY = jax.random.key(2)
LINEAR = eqx.nn.Linear(2, 3, key=jax.random.key(0))
MODEL = kfax.tag(LINEAR)
OTHER = kfax.tag(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(1)))
BATCH = jax.random.normal(KEY, (4, 2)), jnp.ones((4, 3))
OUTPUTS = jnp.linspace(-1, 1, 12).reshape(4, 3)
PARAMETERS = kfax.parameters_of(MODEL)


def loss_fn(model, batch):
    return kfax.squared_error(jax.vmap(model)(batch[0]), batch[1])


PLACEMENT = kfax.Placement(jax.make_mesh((1,), ("data",)))
BLOCKS = kfax.BlockDiagonalCurvature(kfax.ExactGGN())
EXACT = kfax.ExplicitExactCurvature()
ESTIMATORS = {
    "BlockDiagonalCurvature": BLOCKS,
    "ExplicitExactCurvature": EXACT,
    "ImplicitExactCurvature": kfax.ImplicitExactCurvature(),
    "SampleSpaceCurvature": kfax.SampleSpaceCurvature(),
    "PlacedCurvature": kfax.PlacedCurvature(BLOCKS, PLACEMENT),
}


def _refreshed(estimator):
    state = estimator.update(estimator.init(MODEL), loss_fn, MODEL, BATCH)
    return estimator.refresh(state, PARAMETERS, 1.0)


STATES = {name: _refreshed(estimator) for name, estimator in ESTIMATORS.items()}
SPECTRUM = EXACT.decompose(STATES["ExplicitExactCurvature"], PARAMETERS)
BLOCK_SPECTRUM = BLOCKS.decompose(STATES["BlockDiagonalCurvature"], PARAMETERS)
OPTIMIZER = kfax.Optimizer(loss_fn, learning_rate=0.1, momentum=0.9, damping=kfax.LevenbergMarquardt(1.0))
INFLUENCE = kfax.Influence(loss_fn, BLOCKS)
GRADIENTS = INFLUENCE.gradients(MODEL, BATCH)
LAPLACE = kfax.Laplace(MODEL, SPECTRUM, 4, 1.0)
SOLVER = kfax.ConjugateGradients(preconditioner=BLOCKS)
SOLVING = SOLVER.init(STATES["BlockDiagonalCurvature"], GRADIENTS, 1.0)
LINK = kfax.scale_by_curvature(loss_fn, damping=1.0)

LAYERS = {
    "TaggedLinear": LINEAR,
    "TaggedConv": eqx.nn.Conv1d(2, 3, 2, key=KEY),
    "TaggedConvTranspose": eqx.nn.ConvTranspose1d(2, 3, 2, key=KEY),
    "TaggedEmbedding": eqx.nn.Embedding(4, 3, key=KEY),
    "TaggedNorm": eqx.nn.LayerNorm(3),
    "TaggedBatchNorm": eqx.nn.BatchNorm(3, "batch", mode="batch"),
    "TaggedPReLU": eqx.nn.PReLU(),
    "TaggedGRUCell": eqx.nn.GRUCell(2, 3, key=KEY),
    "TaggedLSTMCell": eqx.nn.LSTMCell(2, 3, key=KEY),
    "TaggedModule": LINEAR,
}

_WEIGHTED = {"weights": None, "mask": None, "mean_over_positions": False}
_RUN = {"model": MODEL, "batch": BATCH, "key": None, "model_state": None}
_STEP = {**_RUN, "state": OPTIMIZER.init(MODEL, BATCH), "key": KEY}
_DIMENSION = {"max_dim": 64, "inversion": kfax.Eigh()}
_OPTIMIZER = {"loss_fn": loss_fn, "l2": None, "frozen": None}

CALLS = {
    # Tagging
    "tag": {"model": LINEAR, "registry": kfax.default_registry, "block": None, "frozen": None},
    "untag": {"model": MODEL},
    "set_block": {"model": MODEL, "where": "", "block": kfax.Diagonal()},
    "parameters_of": {"model": MODEL, "frozen": None},
    "coverage": {"model": MODEL, "frozen": None, "devices": 1},
    "check": {**_RUN, "loss_fn": loss_fn, "example_axis": None, "frozen": None},
    "masked": {"module": MODEL, "mask": True},
    "to_matrices": {"tree": PARAMETERS},
    "from_matrices": {"tree": PARAMETERS, "matrices": kfax.to_matrices(PARAMETERS)},
    "Registry": {"rules": None},
    "Registry.register": {"module_type": eqx.nn.Linear, "rule": kfax.TaggedLinear},
    "Registry.apply": {"module": LINEAR},
    **{name: {"layer": layer, "block": kfax.Diagonal()} for name, layer in LAYERS.items()},
    # Losses
    "squared_error": {"predictions": OUTPUTS, "targets": OUTPUTS, **_WEIGHTED},
    "sigmoid_cross_entropy": {"logits": OUTPUTS, "targets": OUTPUTS, **_WEIGHTED},
    "softmax_cross_entropy": {"logits": OUTPUTS, "labels": jnp.array([0, 1, 2, 0]), **_WEIGHTED},
    "poisson_nll": {"log_rates": OUTPUTS, "counts": jnp.ones((4, 3)), **_WEIGHTED},
    "gaussian_nll": {"means": OUTPUTS, "log_variances": OUTPUTS, "targets": OUTPUTS, **_WEIGHTED},
    "function_loss": {
        "function": lambda f: jnp.sum(f**2),
        "outputs": OUTPUTS,
        "event_ndim": 1,
        "sample": None,
        "max_dim": 256,
        **_WEIGHTED,
    },
    "energy_loss": {"log_psi": OUTPUTS[:, 0], "local_energies": OUTPUTS[:, 1], "clip": 5.0, "weights": None},
    "Penalty": {"value": 1.0},
    "value": {"returned": loss_fn(MODEL, BATCH)},
    "across": {"loss_fn": loss_fn, "axis_name": "data"},
    "forward_laplacian": {"function": jnp.sum},
    "check_loss": {"loss": loss_fn(MODEL, BATCH), "key": KEY},
    # Blocks
    "KroneckerFactored": {"sharing": kfax.Expand(), **_DIMENSION},
    "EigenvalueCorrected": {"sharing": kfax.Expand(), "max_dim": 64},
    "KroneckerSum": {"sharing": kfax.Expand(), "max_dim": 64},
    "TensorNormal": _DIMENSION,
    "FrobeniusOptimal": _DIMENSION,
    "KLOptimal": _DIMENSION,
    "UnitWise": {"inversion": kfax.Eigh()},
    "Full": {"inversion": kfax.Eigh()},
    # Curvature
    "CurvaturePropagation": {"num_samples": 1, "source": kfax.ExactGGN()},
    "SampledFisher": {"num_samples": 1},
    "Placement": {"mesh": PLACEMENT.mesh, "axes": "data"},
    "BlockDiagonalCurvature": {"source": kfax.ExactGGN(), "decay": 0.9, "example_axis": None, "placement": None},
    "PlacedCurvature": {"estimator": BLOCKS, "placement": PLACEMENT},
    "ExplicitExactCurvature": {
        "source": kfax.ExactGGN(),
        "decay": 0.9,
        "inversion": kfax.Eigh(),
        "max_dim": 4096,
    },
    "ImplicitExactCurvature": {"source": kfax.ExactGGN(), "preconditioner": None, "solver": lx.CG(1e-3, 1e-3)},
    "SampleSpaceCurvature": {
        "source": kfax.ExactGGN(),
        "inversion": kfax.Eigh(),
        "centered": False,
        "max_numbers": 10**6,
    },
    "BlockCurvature.multiply": {"vector": kfax.to_matrices(PARAMETERS)[""]},
    "Eigendecomposition.power": {"vector": PARAMETERS, "exponent": -0.5, "damping": 1.0},
    "Eigendecomposition.diagonal": {"like": PARAMETERS, "exponent": -0.5, "damping": 1.0},
    "Eigendecomposition.logdet": {"damping": 1.0},
    # Curvature at work
    "Influence": {"loss_fn": loss_fn, "estimator": BLOCKS, "example_axis": None, "frozen": None},
    "Influence.gradients": _RUN,
    "Influence.solve": {"state": STATES["BlockDiagonalCurvature"], "queries": GRADIENTS},
    "Influence.scores": {**_RUN, "directions": GRADIENTS},
    "Influence.scores_by_layer": {**_RUN, "directions": GRADIENTS},
    "Influence.self_influence": {**_RUN, "state": STATES["BlockDiagonalCurvature"]},
    "ConjugateGradients": {"source": kfax.ExactGGN(), "preconditioner": None},
    "ConjugateGradients.init": {"state": STATES["BlockDiagonalCurvature"], "vectors": GRADIENTS, "damping": 1.0},
    "ConjugateGradients.update": {**_RUN, "state": SOLVING, "loss_fn": loss_fn, "frozen": None},
    "ConjugateGradients.step": {"state": SOLVER.update(SOLVING, loss_fn, MODEL, BATCH)},
    "Laplace": {
        "model": MODEL,
        "spectrum": SPECTRUM,
        "num_examples": 4,
        "prior_precision": 1.0,
        "temperature": 1.0,
        "frozen": None,
    },
    "Laplace.log_evidence": {"log_likelihood": -1.0},
    "Laplace.predict": {"function": lambda model: model(BATCH[0][0])},
    "Laplace.sample": {"key": KEY},
    "Predictive.sample": {"key": KEY},
    # The optimizer
    "full_batch": {**_OPTIMIZER, "estimator": None, "quadratic_model": None},
    "stochastic": {**_OPTIMIZER, "learning_rate": 0.1, "weight_decay": 0.1, "estimator": None},
    "Optimizer": {
        **_OPTIMIZER,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "damping": 1.0,
        "weight_decay": 0.1,
        "preconditioner": None,
        "micro_batches": 1,
        "rejection": None,
        "report_layers": False,
    },
    "Optimizer.init": _RUN,
    "Optimizer.step": {**_STEP, "learning_rate": 0.1, "momentum": 0.9, "damping": 1.0},
    "Optimizer.burn_in": _STEP,
    "Optimizer.calibrate": _STEP,
    "Optimizer.refresh": {"model": MODEL, "state": _STEP["state"]},
    "Optimizer.state_axes": {"state": _STEP["state"]},
    "Preconditioner": {
        "estimator": None,
        "inverse_update_period": 5,
        "curvature_update_period": 1,
        "batch": None,
        "damping": None,
        "exponent": -1,
    },
    "Staggered": {"period": 2},
    "Fraction": {"share": 0.5},
    "QuadraticModel": {"source": kfax.ExactGGN(), "batch": None},
    "LossConstraint": {"learning_rate": 0.1, "multiple": 1.0},
    "NormConstraint": {"learning_rate": 0.1, "bound": 1.0},
    "ProjectedMomentum": {"momentum": 0.9},
    "Rejection": {"tolerance": 0.1},
    "LevenbergMarquardt": {
        "initial": 1.0,
        "decay": 0.9,
        "period": 5,
        "lower": 0.25,
        "upper": 0.75,
        "minimum": 1e-8,
        "maximum": 1e8,
        "undone_factor": 2.0,
        "exact_model": None,
        "includes_damping": False,
    },
    "RelativeDamping": {"damping": 1.0},
    "DampingMultiple": {"factor": 1.0},
    "FixedDamping": {"damping": 1.0},
    "ScheduledDamping": {"schedule": lambda step: 1.0},
    "L2": {"coefficient": 0.1, "where": None},
    "WeightDecay": {"coefficient": 0.1, "where": None},
    "EigenbasisAdam": {"estimator": None, "period": 10, "b1": 0.9, "b2": 0.95, "limit": 2.0, "relative_damping": 0.01},
    "scale_by_curvature": {
        "loss_fn": loss_fn,
        "damping": 1.0,
        "preconditioner": None,
        "norm_constraint": None,
        "frozen": None,
    },
    "scale_by_curvature.init": {"params": eqx.filter(MODEL, eqx.is_inexact_array)},
    "scale_by_curvature.update": {
        **_RUN,
        "updates": eqx.filter(MODEL, eqx.is_inexact_array),
        "state": LINK.init(eqx.filter(MODEL, eqx.is_inexact_array)),
        "params": None,
        "key": KEY,
    },
}

for name, state in STATES.items():
    asked = {"state": state, "parameters": PARAMETERS}
    along = {"state": state, "vector": PARAMETERS}
    CALLS |= {
        f"{name}.init": {"model": MODEL, "frozen": None},
        f"{name}.update": {**_RUN, "state": state, "loss_fn": loss_fn, "frozen": None},
        **{f"{name}.{method}": asked for method in ("eigenvalues", "diagonal", "to_dense", "decompose")},
        **{f"{name}.{method}": {**asked, "damping": 1.0} for method in ("refresh", "redamp", "as_operator")},
        **{f"{name}.{method}": along for method in ("solve", "multiply")},
        f"{name}.power": {**along, "exponent": -1, "damping": 1.0},
        f"{name}.as_preconditioner": asked,
    }
CALLS["BlockDiagonalCurvature.refresh"] |= {"only": None}
CALLS["BlockDiagonalCurvature.restart"] = CALLS["BlockDiagonalCurvature.decompose"]
for name in ("BlockDiagonalCurvature", "PlacedCurvature"):
    CALLS[f"{name}.blocks"] = CALLS[f"{name}.decompose"]
for name, arguments in {
    "gathered": {"state": STATES["PlacedCurvature"]},
    "placed": {"state": STATES["BlockDiagonalCurvature"], "parameters": PARAMETERS},
}.items():
    CALLS[f"PlacedCurvature.{name}"] = arguments
for name, arguments in {
    "gram": {"vectors": [PARAMETERS]},
    "multiply_jacobian": {"vector": PARAMETERS},
    "multiply_jacobian_transpose": {"vectors": (OUTPUTS,)},
    "multiply_factor": {"vector": OUTPUTS},
    "multiply_factor_transpose": {"vector": PARAMETERS},
}.items():
    CALLS[f"ImplicitExactCurvature.{name}"] = {"state": STATES["ImplicitExactCurvature"], **arguments}

for name in (
    "ImplicitExactCurvature.eigenvalues",
    "ImplicitExactCurvature.diagonal",
    "ImplicitExactCurvature.decompose",
):
    del CALLS[name]  # always refused, and so are the next two
del CALLS["SampleSpaceCurvature.diagonal"], CALLS["SampleSpaceCurvature.decompose"]

OWNERS = {
    **ESTIMATORS,
    "Registry": kfax.default_registry,
    "BlockCurvature": BLOCKS.blocks(STATES["BlockDiagonalCurvature"], PARAMETERS)[""],
    "Eigendecomposition": SPECTRUM,
    "Influence": INFLUENCE,
    "ConjugateGradients": SOLVER,
    "Laplace": LAPLACE,
    "Predictive": LAPLACE.predict(lambda model: model(BATCH[0][0])),
    "Optimizer": OPTIMIZER,
    "scale_by_curvature": LINK,
}


def function_of(name):
    """What `name` in `CALLS` stands for."""
    owner, _, method = name.partition(".")
    return getattr(OWNERS[owner], method) if method else getattr(kfax, name)

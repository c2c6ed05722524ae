"""Runs a structure on many batches, and says of each case whether kfax was right, refused it, or is to be mended."""

import collections
import dataclasses
import re
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import networks
import numpy as np
from cases import ALL_LOSSES
from jax.flatten_util import ravel_pytree
from numbers_of_batches import EXTREME, KINDS, make_batch, make_parameters, perturbed
from truth import make_truth, SECOND

import kfax


DAMPING = 0.3
TOLERANCE = {"float64": 1e-8, "float32": 1e-3}
EXACT_DIAGONAL = (kfax.Diagonal, kfax.Full, kfax.UnitWise)
OF_EXACT_TRACE = (*EXACT_DIAGONAL, kfax.ScaledIdentity, kfax.TensorNormal, kfax.EigenvalueCorrected)
ONE_EXAMPLE = (*EXACT_DIAGONAL, kfax.KroneckerFactored, kfax.TensorNormal)

RESULTS = (
    *("successful", "invalid_setting", "non_finite_batch", "non_finite_update", "rejected"),
    *("non_finite_inverse", "non_finite_curvature"),
)
BLOCKS = {
    "default": lambda: None,
    "expand": lambda: kfax.KroneckerFactored(),
    "reduce": lambda: kfax.KroneckerFactored(kfax.Reduce()),
    "expand-eigh": lambda: kfax.KroneckerFactored(inversion=kfax.Eigh()),
    "reduce-diagonal": lambda: kfax.KroneckerFactored(kfax.Reduce(), max_dim=3),
    "corrected": lambda: kfax.EigenvalueCorrected(),
    "corrected-reduce": lambda: kfax.EigenvalueCorrected(kfax.Reduce()),
    "tensor": lambda: kfax.TensorNormal(),
    "diagonal": lambda: kfax.Diagonal(),
    "full": lambda: kfax.Full(),
    "unit": lambda: kfax.UnitWise(),
    "identity": lambda: kfax.ScaledIdentity(),
    "kl": lambda: kfax.KLOptimal(),
    "frobenius": lambda: kfax.FrobeniusOptimal(),
}
SOURCES = {"ggn": kfax.ExactGGN, "fisher": kfax.ExactFisher, "empirical": kfax.EmpiricalFisher}
FROZEN = {
    "nothing": None,
    "first": lambda m: m.pieces[0],
    "head-bias": lambda m: m.head.bias,
    "head-weight": lambda m: m.head.weight,
    "first-weight": lambda m: jax.tree.leaves(eqx.filter(m.pieces[0], eqx.is_inexact_array))[:1],
}


@dataclasses.dataclass
class Verdict:
    """What came of a structure: how many cases by outcome, and what is to be mended."""

    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    refusal: str = ""


def judge(structure, num_cases):
    verdict = Verdict()
    try:
        setup = _Setup(structure)
    except Exception as error:  # whatever it is: that is the question
        text = f"{type(error).__name__}: {error}"
        if not (isinstance(error, ValueError) and _is_of_kfax(str(error))):
            verdict.faults.append(f"error that is not of kfax: {text[:600]}")
        elif not structure.may_be_refused:
            verdict.faults.append(f"refused: {text[:600]}")
        verdict.outcomes["refused"] += 1
        verdict.refusal = text
        return verdict
    for i in range(num_cases):
        kind = KINDS[i % len(KINDS)]
        try:
            outcome, fault = setup.run(kind, i)
        except Exception as error:
            if i == 0 and structure.may_be_refused and isinstance(error, ValueError) and _is_of_kfax(str(error)):
                verdict.outcomes["refused"] += 1
                return verdict
            outcome, fault = "error", f"{type(error).__name__}: {str(error)[:600]}"
        verdict.outcomes[outcome] += 1
        if fault:
            verdict.faults.append(f"{kind} {i}: {fault}")
    if setup.num_compiled > 1:
        verdict.faults.append(f"the step was compiled {setup.num_compiled} times")
    return verdict


def _is_of_kfax(message):
    """Names an argument, a layer by its path, or what to write."""
    return bool(re.search(r"`[^`]+`", message)) and "Traceback" not in message


class _Setup:
    """A structure with everything that is compiled for it."""

    def __init__(self, structure):
        self.structure = structure
        self.network = networks.make_network(structure)
        frozen = FROZEN[structure.frozen]
        excluded = {id(leaf) for leaf in jax.tree.leaves(frozen(self.network))} if frozen else set()
        self.spec = jax.tree.map(lambda x: eqx.is_inexact_array(x) and id(x) not in excluded, self.network)
        self.frozen = frozen
        self.truth = make_truth(structure, self.network, self.spec)
        batch = make_batch(structure, "normal", 12345)
        start = make_parameters(structure, "normal", self.network, 54321)
        self.tagged = kfax.tag(start, registry=networks.REGISTRY, block=BLOCKS[structure.block](), frozen=frozen)
        self.optimizer = make_optimizer(structure, self.loss_fn, frozen)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.state = self.optimizer.init(self.tagged, batch)
        self.groups, self.blocks = self._groups()
        self.num_compiled = 0
        self.step = eqx.filter_jit(self._step)

    def loss_fn(self, model, batch):
        structure = self.structure
        options: dict[str, Any] = {}
        if structure.weighted:
            options["weights"] = batch["weights"]
        if structure.masked:
            options["mask"] = batch["mask"]
        if structure.mean_over_positions:
            options["mean_over_positions"] = True
        outputs = networks.outputs_of(structure, model, batch)
        loss = ALL_LOSSES[structure.loss].make(outputs, batch["y"], **options)
        if not structure.second_loss:
            return loss
        return [loss, SECOND * kfax.squared_error(outputs, jnp.zeros_like(outputs), **options)]

    def _step(self, model, state, batch):
        self.num_compiled += 1  # by tracing
        new_model, new_state, info = self.optimizer.step(model, state, batch, key=jax.random.key(1))
        estimator = self.optimizer.estimator
        parameters = kfax.parameters_of(model, frozen=self.frozen)
        matrix = estimator.to_dense(new_state.curvature, parameters)
        again = matrix
        is_corrected = any(isinstance(block, kfax.EigenvalueCorrected) for block in self.blocks)
        if is_corrected and isinstance(estimator, kfax.BlockDiagonalCurvature):
            # A second pass, in the eigenbases of the first one.
            second = estimator.restart(new_state.curvature, parameters)
            second = estimator.update(second, self.loss_fn, model, batch, frozen=self.frozen)
            again = estimator.to_dense(second, parameters)
        return new_model, new_state, info, matrix, again

    @property
    def is_block_diagonal(self):
        return isinstance(self.optimizer.estimator, kfax.BlockDiagonalCurvature)

    def _groups(self):
        """For each trained number the index of its block, by the paths of the model without tags; and the blocks."""
        names, blocks = [], {}
        layers = dict(_tagged_layers(self.tagged))
        for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(self.network, self.spec)):
            owner = max((p for p in layers if jax.tree_util.keystr(path).startswith(p + ".")), key=len)
            operation = _operation_of(layers[owner].layer, jax.tree_util.keystr(path[-1:]))
            depth = jax.tree_util.keystr(path).count(".stacked")
            members = np.arange(np.prod(leaf.shape[:depth], dtype=int))
            for member in np.repeat(members, leaf[(0,) * depth].size):
                names.append((owner, operation, member))
                blocks[names[-1]] = layers[owner].block_of(operation)
        keys = list(dict.fromkeys(names))
        return np.array([keys.index(name) for name in names]), [blocks[key] for key in keys]

    def run(self, kind, seed):
        """The outcome, and what is wrong or nothing."""
        structure = self.structure
        batch = make_batch(structure, kind, seed)
        network = make_parameters(structure, kind, self.network, seed)
        model = jax.tree.unflatten(jax.tree.structure(self.tagged), jax.tree.leaves(network))
        new_model, new_state, info, matrix, again = jax.block_until_ready(self.step(model, self.state, batch))
        truth = self.truth(network, batch)
        near = self.truth(perturbed(structure, network, seed), perturbed(structure, batch, seed))
        if fault := _structure_fault(self.state, new_state) or _structure_fault(model, new_model):
            return "wrong", fault
        if paths := _not_finite((self.state, model), (new_state, new_model)):
            return "wrong", f"not finite: {paths}"
        if self.frozen is not None:
            old, new = (eqx.filter(m, self._not_trained(m)) for m in (model, new_model))
            if not eqx.tree_equal(old, new):
                return "wrong", "a frozen parameter has changed"
        result = kfax.StepResult[info.result]
        is_finite = all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(truth))
        # Nothing is added to no curvature by a damping that is relative to it.
        is_flat = not np.any(np.asarray(truth.matrix))
        name = next(name for name in RESULTS if bool(getattr(kfax.StepResult, name) == info.result))
        if name in ("non_finite_batch", "non_finite_curvature", "non_finite_update"):
            limit = 1e100 if structure.dtype == "float64" else 1e12
            if is_finite and not is_flat and _size(truth) < limit:
                return "wrong", f"{result} But loss, gradient and curvature are finite."
            if name == "non_finite_batch" and not eqx.tree_equal(model, new_model):
                return "wrong", "changed by a batch that is not finite"
            return "kept as it was", ""
        if not is_finite:
            # Where a number and its logarithm are far apart kfax may be finite and the reference not.
            return ("finite", "") if kind in EXTREME else ("wrong", f"not finite, but {result}")
        if structure.dtype == "float32" and kind in EXTREME:
            return "finite", ""
        fault = self._compare(kind, truth, near, info, matrix, again)
        if not fault and name != "rejected":
            fault = self._compare_step(kind, model, new_model, truth, info, matrix)
        if not fault and kind not in EXTREME and not is_flat and name not in ("successful", "rejected"):
            fault = f"a step that failed: {result}"
        return ("wrong", fault) if fault else ("right", "")

    def _not_trained(self, model):
        return jax.tree.unflatten(jax.tree.structure(model), [not each for each in jax.tree.leaves(self.spec)])

    def _compare(self, kind, truth, near, info, matrix, again):
        tolerance = TOLERANCE[self.structure.dtype]
        for name, found, exact, other in (
            ("loss", float(info.loss), truth.loss, near.loss),
            ("gradient", float(info.gradient_norm), np.linalg.norm(truth.gradient), np.linalg.norm(near.gradient)),
        ):
            slack = 100 * abs(float(other) - float(exact)) + tolerance * abs(float(exact)) + 1e-25
            if not abs(found - float(exact)) <= slack:
                return f"{name}: {found} instead of {float(exact)}"
        exact, other, matrix, again = (np.asarray(m, float) for m in (truth.matrix, near.matrix, matrix, again))
        if not self.is_block_diagonal:
            return _distance("matrix", matrix, exact, other, tolerance)
        between = self.groups[:, None] != self.groups[None, :]
        if np.any(matrix[between]):
            return "blocks are not apart"
        is_one = kind == "equal" and self.structure.uses_each_layer_once
        for index, block in enumerate(self.blocks):
            own = np.ix_(self.groups == index, self.groups == index)
            mine, theirs, nearby, second = matrix[own], exact[own], other[own], again[own]
            kept = {kfax.Full: np.ones_like(mine, bool), kfax.Diagonal: np.eye(len(mine), dtype=bool)}
            if is_one and isinstance(block, ONE_EXAMPLE) and not isinstance(block, EXACT_DIAGONAL):
                if getattr(block, "max_dim", 9) > 3:
                    kept[type(block)] = np.ones_like(mine, bool)
            if isinstance(block, kfax.UnitWise):
                kept[kfax.UnitWise] = (mine != 0) | np.eye(len(mine), dtype=bool)
            name = f"{block} of {index}"
            if type(block) in kept:
                where = kept[type(block)]
                fault = _distance(name, mine, theirs * where, nearby * where, tolerance)
                if fault:
                    return fault
            if isinstance(block, OF_EXACT_TRACE):
                mine = second if isinstance(block, kfax.EigenvalueCorrected) else mine
                traces = (np.array([np.trace(m)]) for m in (mine, theirs, nearby))
                if fault := _distance(f"trace, {name}", *traces, tolerance):
                    return fault
            if not np.all(np.linalg.eigvalsh(mine) >= -1e-5 * np.max(np.abs(mine), initial=0)):
                return f"negative eigenvalue, {name}"
        return ""

    def _compare_step(self, kind, model, new_model, truth, info, matrix):
        """`(C + λI) δ = -α g`, where damping is exact and velocity zero."""
        exact = (*EXACT_DIAGONAL, kfax.ScaledIdentity)
        if self.structure.optimizer not in ("plain", "explicit") or kind in EXTREME:
            return ""
        if self.is_block_diagonal and not all(
            isinstance(b, exact) or isinstance(getattr(b, "inversion", None), kfax.Eigh) for b in self.blocks
        ):
            return ""
        old, new = (ravel_pytree(kfax.parameters_of(m, frozen=self.frozen))[0] for m in (model, new_model))
        old, new, gradient = (np.asarray(v, float) for v in (old, new, truth.gradient))
        damped = np.asarray(matrix, float) + DAMPING * np.eye(len(old))
        rate, update, eps = float(info.learning_rate), new - old, np.finfo(self.structure.dtype).eps
        residual = np.linalg.norm(damped @ update + rate * gradient)
        sizes = np.linalg.norm(old) + np.linalg.cond(damped) * np.linalg.norm(update)
        rounding = eps * np.linalg.norm(damped, 2) * sizes
        bound = TOLERANCE[self.structure.dtype] * rate * np.linalg.norm(gradient) + 100 * rounding
        return "" if residual <= bound else f"step: off by {residual} of {rate * np.linalg.norm(gradient)}"


def make_optimizer(structure, loss_fn, frozen):
    source = SOURCES[structure.source]()
    axis = "batch" if structure.layout in ("named", "second-axis", "noise-inside", "noise-outside") else None
    estimator = kfax.BlockDiagonalCurvature(source, example_axis=axis)
    if structure.optimizer == "explicit":
        estimator = kfax.ExplicitExactCurvature(source)
    model, rate = kfax.QuadraticModel(source), kfax.NormConstraint(0.1, 1e-2)
    period, exponent = 1, -1.0
    settings: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.0, "damping": DAMPING, "frozen": frozen}
    settings |= {
        "staggered": {"momentum": 0.9},
        "quadratic": {"learning_rate": model, "momentum": model, "damping": kfax.LevenbergMarquardt(1.0)},
        "norm": {"learning_rate": rate, "report_layers": True},
        "rejection": {"rejection": kfax.Rejection()},
        "micro": {"micro_batches": 2 if structure.num_examples % 2 == 0 else 1},
        "relative": {
            **{"learning_rate": model, "momentum": model, "rejection": kfax.Rejection()},
            "damping": kfax.RelativeDamping(kfax.LevenbergMarquardt(1.0, period=1)),
        },
    }.get(structure.optimizer, {})
    if structure.optimizer == "staggered":
        period = kfax.Staggered(2)
    if structure.optimizer == "power":
        exponent = -0.5
    preconditioner = kfax.Preconditioner(estimator, inverse_update_period=period, exponent=exponent)
    return kfax.Optimizer(loss_fn, preconditioner=preconditioner, **settings)


def _tagged_layers(model):
    is_tagged = lambda node: isinstance(node, kfax.TaggedLayer)  # noqa: E731
    for path, node in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_tagged):
        if is_tagged(node):
            yield jax.tree_util.keystr(path), node


def _operation_of(layer, field):
    """Which matrix of a recurrent cell a parameter belongs to."""
    if isinstance(layer, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        return {".weight_hh": "hidden", ".bias_n": "candidate"}.get(field, "input")
    return ""


def _distance(name, found, exact, nearby, tolerance):
    if not np.all(np.isfinite(found)):
        return f"{name}: not finite"
    allowed = tolerance * np.max(np.abs(exact), initial=0) + 100 * np.max(np.abs(nearby - exact), initial=0) + 1e-25
    error = np.max(np.abs(found - exact), initial=0)
    return "" if error <= allowed else f"{name}: off by {error:.3g} of {np.max(np.abs(exact)):.3g}"


def _structure_fault(old, new):
    if jax.tree.structure(old) != jax.tree.structure(new):
        return "the structure has changed"
    for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if eqx.is_array(x) and (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"an array has changed from {x.shape} {x.dtype} to {y.shape} {y.dtype}"
    return ""


def _not_finite(old, new):
    """The paths of what is NaN, or infinite and was not; inverses of nothing are those of infinite eigenvalues."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(new, eqx.is_inexact_array))
    pairs = zip(leaves, jax.tree.leaves(eqx.filter(old, eqx.is_inexact_array)), strict=True)
    is_good = lambda x, y: np.isfinite(y) | (np.isinf(x) & (x == y))  # noqa: E731
    return [jax.tree_util.keystr(path) for (path, y), x in pairs if not np.all(is_good(np.asarray(x), np.asarray(y)))][
        :3
    ]


def _size(tree):
    return max(float(np.max(np.abs(leaf), initial=0)) for leaf in jax.tree.leaves(tree))

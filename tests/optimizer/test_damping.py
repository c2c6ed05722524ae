"""Damping: the preconditioner's own, relative, by a rule of one's own, and calibrated."""

import equinox as eqx
import jax.numpy as jnp
import pytest
from cases import grid, make_case
from helpers import assert_close, flat, parameters
from preconditioner_cases import change, EXACT, ggn_at, gradient_at, make, train

import kfax


@grid(damping=["multiple", "absolute", "scheduled"])
def test_the_preconditioner_may_have_a_damping_of_its_own(damping):
    case = make_case("mlp", "softmax")
    own = {"multiple": kfax.DampingMultiple(3.0), "absolute": 0.7, "scheduled": lambda step: 1.0 / (1 + step)}[damping]
    optimizer = make(case.loss_fn, kfax.Preconditioner(EXACT, inverse_update_period=1, damping=own), l2=0.05)
    *_, state, info = train(optimizer, case.model, [case.batch] * 2)[-1]
    value = {"multiple": 0.3, "absolute": 0.7, "scheduled": 0.5}[damping]
    expected = EXACT.refresh(state.curvature, parameters(case.model), jnp.asarray(value + 0.05))
    assert_close(state.curvature.inverses, expected.inverses)
    assert_close(info.damping, jnp.asarray(0.1))
    with pytest.raises(ValueError, match="is a multiple of the optimizer's λ, for the preconditioner"):
        make(case.loss_fn, None, damping=kfax.DampingMultiple(2.0))
    with pytest.raises(ValueError, match="`LevenbergMarquardt` adapts λ by the loss after each step"):
        kfax.Preconditioner(EXACT, damping=kfax.LevenbergMarquardt(1.0))


def test_relative_damping_makes_the_scale_of_the_loss_irrelevant():
    """(cC + cλ)⁻¹ c∇h: exact case 13, without telling the optimizer of c."""
    case = make_case("mlp", "softmax")
    rule = kfax.RelativeDamping(kfax.LevenbergMarquardt(0.5, period=1))
    auto = kfax.QuadraticModel()

    def trained(c):
        def loss_fn(model, batch):
            return c * case.loss_fn(model, batch)

        optimizer = make(loss_fn, kfax.Preconditioner(EXACT), damping=rule, learning_rate=auto, momentum=auto)
        return train(optimizer, case.model, [case.batch] * 6)

    one, seven = trained(1.0), trained(7.0)
    # Rounding errors grow from step to step.
    assert_close(parameters(seven[-1][1]), parameters(one[-1][1]), tolerance=1e-8)
    assert_close(seven[-1][3].damping, 7 * one[-1][3].damping, tolerance=1e-8)
    diagonal = flat(EXACT.diagonal(one[0][2].curvature, parameters(case.model)))
    assert_close(one[0][3].damping, 0.5 * jnp.mean(diagonal))


def test_relative_damping_of_an_indefinite_matrix_is_positive():
    case = make_case("mlp", "softmax")
    hessian = kfax.ExplicitExactCurvature(kfax.Hessian(), inversion=kfax.Eigh())

    def negative(model, batch):
        loss = case.loss_fn(model, batch)
        return [0.0 * loss, kfax.Penalty(-loss.value())]

    optimizer = make(negative, kfax.Preconditioner(hessian), damping=kfax.RelativeDamping(0.5))
    state = eqx.filter_jit(optimizer.init)(case.model, case.batch)
    _, state, info = eqx.filter_jit(optimizer.step)(case.model, state, case.batch)
    diagonal = flat(hessian.diagonal(state.curvature, parameters(case.model)))
    assert jnp.sum(diagonal) < 0
    assert_close(info.damping, 0.5 * jnp.mean(jnp.abs(diagonal)))
    with pytest.raises(ValueError, match="`kfax.RelativeDamping` needs the diagonal"):
        make(case.loss_fn, kfax.Preconditioner(kfax.ImplicitExactCurvature()), damping=kfax.RelativeDamping(0.5))


class Annealed(kfax.DampingRule):
    """A rule of one's own, whose λ is not what it stores."""

    def init(self):
        return jnp.asarray(2.0)

    def value(self, stored, step):
        return stored * 0.9**step

    def wants_ratio(self, step):
        return False

    def update(self, stored, ratio):
        return stored


def test_a_damping_rule_of_ones_own_keeps_what_it_stores():
    case = make_case("mlp", "softmax")
    history = train(make(case.loss_fn, kfax.Preconditioner(EXACT), damping=Annealed()), case.model, [case.batch] * 4)
    assert_close(jnp.stack([row[3].damping for row in history]), 2.0 * 0.9 ** jnp.arange(4))
    assert all(row[2].damping == 2.0 for row in history)


def test_levenberg_marquardt_may_ask_for_the_exact_model():
    case = make_case("mlp", "softmax")
    infos = []
    for exact in (None, kfax.ExactGGN()):
        rule = kfax.LevenbergMarquardt(0.5, period=2, exact_model=exact)
        history = train(make(case.loss_fn, kfax.Preconditioner(EXACT), damping=rule), case.model, [case.batch] * 2)
        assert jnp.isnan(history[0][3].reduction_ratio)
        infos.append(history[1][3])
    before, after, *_ = history[1]
    theta, unravel, update = change(before, after)
    matrix = ggn_at(case, before, case.batch)
    slope = gradient_at(case, theta, unravel) @ update
    assert_close(infos[1].predicted_change, slope + update @ matrix @ update / 2)
    assert not jnp.allclose(infos[0].predicted_change, infos[1].predicted_change, rtol=1e-3)


def test_calibration_finds_where_the_rule_rests():
    case = make_case("mlp", "softmax")
    for initial in (1e-4, 1e4):
        rule, auto = kfax.LevenbergMarquardt(initial, decay=0.9, period=5), kfax.QuadraticModel()
        optimizer = make(case.loss_fn, kfax.Preconditioner(EXACT), damping=rule, learning_rate=auto, momentum=auto)
        state = eqx.filter_jit(optimizer.init)(case.model, case.batch)
        new = eqx.filter_jit(optimizer.calibrate)(case.model, state, case.batch)
        assert new.step == 0 and new.damping != state.damping
        assert bool(eqx.tree_equal(new.velocity, state.velocity))
        # There the ratio of the first step is within the thresholds, or one adjustment from being so.
        measuring = eqx.tree_at(lambda o: o.damping, optimizer, kfax.LevenbergMarquardt(1.0, period=1))
        step = eqx.filter_jit(measuring.step)
        tries = (new.damping * 0.9**5, new.damping)
        ratios = [step(case.model, state, case.batch, damping=d)[2].reduction_ratio for d in tries]
        assert min(ratios) < 0.75 and max(ratios) > 0.25
    # There is nothing to be found on a batch that is not finite, nor where nothing moves.
    bad = (case.x * jnp.nan, case.y)
    assert eqx.filter_jit(optimizer.calibrate)(case.model, state, bad).damping == state.damping
    exact = kfax.Preconditioner(EXACT)
    nowhere = make(lambda m, b: 0.0 * case.loss_fn(m, b), exact, damping=rule, learning_rate=auto, momentum=auto)
    assert eqx.filter_jit(nowhere.calibrate)(case.model, state, case.batch).damping == state.damping
    with pytest.raises(ValueError, match="`calibrate` needs a damping that adapts"):
        make(case.loss_fn, None).calibrate(case.model, state, case.batch)


def test_levenberg_marquardt_may_include_the_damping():
    case = make_case("mlp", "softmax")
    plain, damped = (kfax.LevenbergMarquardt(0.5, period=1, includes_damping=flag) for flag in (False, True))
    infos = [
        train(make(case.loss_fn, kfax.Preconditioner(EXACT), damping=rule), case.model, [case.batch])[0][3]
        for rule in (plain, damped)
    ]
    assert_close(infos[1].predicted_change, infos[0].predicted_change + 0.25 * infos[0].update_norm ** 2)
    actual = [info.reduction_ratio * info.predicted_change for info in infos]
    assert_close(actual[1], actual[0])

"""Random models, batches, losses, blocks, sources and optimizers, against a slow dense reference.

`grammar.py` draws structures, `networks.py` makes models of them, `truth.py` has loss, gradient and curvature of the
model without tags, in float64 by `jax.jacrev` and `jax.hessian`, and `judge.py` compares. Each structure is compiled
once, and run on 34 batches, of which most are at an edge: zeros, equal examples, numbers of 1e10 and 1e-10, no weights,
a NaN. Each case has to be one of

- *right*: loss and gradient; the whole matrix, or whatever is exact of each layer's block; the step, where its damping
  is exact; up to 1e-8 (1e-3 in float32) and what rounding of the inputs changes. What is frozen stays the same.
- *kept as it was*: the batch was not finite, or overflowed, and nothing of it is in model or state.
- *finite*: numbers so large or so far apart that the precision does not say more than that all is finite.
- *refused*: an error of kfax, for a structure that may be refused.

`nice pytest -m slow tests/generated` runs all, and prints how many of each there were.

A run of seeds 1 to 23 before the last changes to these tests had 276 structures and 8,658 cases: 7,744 right, 638 kept
as they were, 22 refused, 254 faults. Most faults were those of the tests. Still open: in float32 `kfax.check` refuses
a model with two attentions after each other, of which the second has almost equal inputs (seed 20); `gradient_norm`
is infinite in float32 for gradients above 1e19. Full figures with the tests as they are now have yet to be had.

What it found and what was mended: `test_a_masked_layer_that_is_the_same_at_every_position`.
"""

import collections
import gc

import jax
import pytest
from grammar import structures
from hypothesis import given, HealthCheck, Phase, seed, settings
from judge import judge


def explore(number, num_structures, num_cases):
    """How many structures and cases of each outcome there were, and what is to be mended."""
    counts, faults = collections.Counter(), []

    # What fails is small as it is, and a structure written out can be tried again: so nothing is shrunk.
    @seed(number)
    @settings(
        max_examples=num_structures,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(structures())
    def run(structure):
        verdict = judge(structure, num_cases)
        counts.update(verdict.outcomes)
        counts["structures"] += 1
        faults.extend(f"{structure}\n    {fault}" for fault in verdict.faults)

    run()
    jax.clear_caches()
    gc.collect()
    return counts, faults


@pytest.mark.parametrize("number", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 27))])
def test_each_case_is_right_or_an_error_that_helps(number, record_property):
    counts, faults = explore(number, 5, 5) if number == 0 else explore(number, 12, 34)
    for name, count in counts.items():
        record_property(f"generated {name}", count)
    assert not faults, "\n".join(faults[:20])
    assert counts["right"] > sum(counts.values()) / 2

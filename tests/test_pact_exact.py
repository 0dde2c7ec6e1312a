"""Exact solvers: brute force agrees, laws of monotonicity, proofs of infeasibility."""

import dataclasses

import numpy as np
import pytest
from pact_cases import small

from gcjax import pact
from gcjax.pact import exact, graph


def optimum(problem, filtered=True):
    """Joules of labels without the bucket's help; None where infeasible is proved."""
    if problem.start_loss <= problem.max_loss:
        return 0.0
    found = exact.labels(graph.build(problem, filtered))
    assert found.complete
    if found.choices is None:
        return None
    plan = pact.replay(problem, found.choices)
    assert pact.feasible(problem, plan)
    np.testing.assert_allclose(plan.joules, found.lower_j, rtol=1e-9)
    return plan.joules


@pytest.mark.parametrize("block", range(8))
def test_labels_agree_with_brute_force(block):
    feasible = 0
    for seed in range(30 * block, 30 * block + 30):
        versions, epochs = 1 + seed % 3, 3 + seed % 2
        problem = small(seed, versions, 2, epochs)
        best = exact.brute_force(problem)
        found = optimum(problem)
        feasible += best is not None
        if best is None:
            assert found is None
        else:
            np.testing.assert_allclose(found, best.joules, rtol=1e-9)
    assert 5 < feasible < 30

"""Contradictions are refused with a reason; the predictor keeps its promises."""

import dataclasses

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pact_cases import small

from gcjax import pact

PROBLEM = small(1, 3, 2, 4)


def changed(kind, index, **fields):
    """PROBLEM with one part changed."""
    parts = list(getattr(PROBLEM, kind))
    parts[index] = dataclasses.replace(parts[index], **fields)
    return dataclasses.replace(PROBLEM, **{kind: tuple(parts)})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: changed("nodes", 0, flops_per_s=0.0), "flops_per_s must be above 0"),
        (lambda: changed("nodes", 0, flops_per_s=float("nan")), "above 0, got nan"),
        (lambda: changed("nodes", 0, histogram=(0, 0, 0)), "has no data"),
        (lambda: changed("nodes", 0, histogram=(1, 2)), "differ in their classes"),
        (lambda: changed("links", 0, bits_per_s=-1.0), "bits_per_s must be above 0"),
        (lambda: changed("clusters", 0, members=("nobody",)), "'nobody' is not among"),
        (lambda: changed("clusters", 0, efficiency=2.0), "must be in \\[0, 1\\]"),
        (
            lambda: dataclasses.replace(PROBLEM, links=()),
            "no link joins 'n1' and its coordinator 'n0'",
        ),
        (
            lambda: pact.tabulate(changed("versions", 0, training_bytes=1e3)),
            "no cluster can hold version 'v0'",
        ),
        (lambda: PROBLEM.with_target(deadline_s=0.0), "deadline_s must be above 0"),
        (lambda: PROBLEM.with_target(max_loss=float("nan")), "must be a number"),
        (lambda: dataclasses.replace(PROBLEM, start_loss=9.0), "above top_loss"),
        (lambda: changed("switches", 0, source="v2"), "growing back is not supported"),
        (lambda: changed("nodes", 0, name="n1"), "stand there twice"),
        (lambda: pact.PowerLaw(0.1, float("nan"), 0.5), "scale must be a number"),
        (lambda: pact.Jump(2.0, 1.0, 2.5), "above 1"),
        (lambda: pact.plan(PROBLEM, "magic"), "solver must be one of"),
        (lambda: pact.plan(PROBLEM, resolution=(60, 60)), "two powers of two"),
        (lambda: pact.plan(PROBLEM, "cost_scaled", -1.0), "must be above 0"),
        (lambda: pact.fit_curve([1, 2, 3, 4], [2, 1, np.nan, 1]), "not finite"),
        (lambda: pact.fit_jump(np.array([1.0]), np.array([np.nan]), 2.0), "not finite"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unreachable_clusters_are_told():
    alone = dataclasses.replace(
        small(1, 1, 2, 4),
        links=(),
        clusters=(pact.Cluster("a", ("n0",)), pact.Cluster("b", ("n1",))),
        start_cluster="a",
    )
    nodes = (dataclasses.replace(alone.nodes[0], memory_bytes=1.0), alone.nodes[1])
    with pytest.raises(ValueError, match="no cluster can be reached"):
        pact.tabulate(dataclasses.replace(alone, nodes=nodes))


def test_a_config_builds_the_same_problem():
    def plain(part):
        fields = dataclasses.asdict(part)
        if "curve" in fields:
            power = isinstance(part.curve, pact.PowerLaw)
            fields["curve"]["kind"] = "power" if power else "exponential"
        return fields

    parts = ("nodes", "links", "clusters", "versions", "switches")
    given = dataclasses.asdict(PROBLEM)
    given |= {k: tuple(plain(x) for x in getattr(PROBLEM, k)) for k in parts}
    assert pact.from_config(ml_collections.ConfigDict(given)) == PROBLEM
    given["nodes"] = ({"name": "x", "speed": 1.0},)
    with pytest.raises(ValueError, match="unknown fields \\['speed'\\]"):
        pact.from_config(given)


def test_costs_of_a_cooperative_epoch_by_hand():
    """Two nodes, numbers that can be checked on paper."""
    node = dict(flops_per_s=10.0, memory_bytes=9.0, joules_per_flop=0.5)
    slow = dict(flops_per_s=5.0, memory_bytes=9.0, joules_per_flop=0.1)
    problem = pact.Problem(
        nodes=(
            pact.Node("a", **node, histogram=(10, 0), idle_watts=2.0),
            pact.Node("b", **slow, histogram=(0, 20), input_bytes_per_s=4.0),
        ),
        links=(pact.Link(("a", "b"), 8.0, joules_per_bit=0.25, latency_s=0.5),),
        clusters=(pact.Cluster("a", ("a",)), pact.Cluster("ab", ("a", "b"), 3, 0.9)),
        versions=(
            pact.ModelVersion("v", 1, 2.0, 1.0, 5.0, pact.PowerLaw(0.1, 2.0, 0.5)),
        ),
        switches=(),
        start_version="v",
        start_cluster="a",
        start_loss=1.0,
        top_loss=2.0,
        max_loss=0.5,
        deadline_s=1e3,
        max_epochs=9,
        sample_bytes=3.0,
        skew_loss=0.3,
    )
    tables = pact.tabulate(problem)
    # a alone: 10 samples, 20 FLOP in 2 s (reading is instant), 10 J. Its labels are
    # 2/3 away from (1/3, 2/3), so 0.2 of the progress is lost.
    np.testing.assert_allclose(tables.seconds[0, 0, 0], 2.0)
    np.testing.assert_allclose(tables.energy_j[0, 0, 0], 10.0)
    np.testing.assert_allclose(tables.progress[0, 0, 0], 10 * 0.8)
    # Both: b computes 8 s, but reads 60 bytes in 15 s. Three rounds of 16 bits and
    # two latencies: 6 + 3 s. a waits 22 of 24 s at 2 W; 48 bits cost 12 J.
    np.testing.assert_allclose(tables.seconds[0, 0, 1], 24.0)
    np.testing.assert_allclose(tables.energy_j[0, 0, 1], 10 + 4 + 44 + 12)
    np.testing.assert_allclose(tables.progress[0, 0, 1], 30 * 0.9)


curves = st.one_of(
    st.builds(pact.PowerLaw, st.floats(0, 0.5), st.floats(0.5, 50), st.floats(0.1, 2)),
    st.builds(
        pact.Exponential, st.floats(0, 0.5), st.floats(0.5, 5), st.floats(1e-4, 0.1)
    ),
)
jumps = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
    lambda p: pact.Jump(p[0], p[1], 3.0)
)


@settings(max_examples=60, deadline=None)
@given(curves, jumps, st.floats(0.1, 1e3))
def test_maps_of_the_loss_are_monotone_and_1_lipschitz(curve, jump, samples):
    losses = np.linspace(0.01, 3.0, 500)
    for after in (pact.next_loss(curve, losses, samples), jump.after(losses)):
        slope = np.diff(after) / np.diff(losses)
        assert np.all(slope >= -1e-9) and np.all(slope <= 1 + 1e-6)
    assert np.all(pact.next_loss(curve, losses, samples) <= losses + 1e-12)
    assert np.all(jump.after(losses) >= losses) and np.all(jump.after(losses) <= 3.0)


@pytest.mark.parametrize("kind", ["power", "exponential"])
def test_a_fit_finds_the_curve_that_made_the_data(kind):
    x = np.geomspace(50, 5000, 30)
    if kind == "power":
        truth = pact.PowerLaw(0.3, 8.0, 0.4)
    else:
        truth = pact.Exponential(0.3, 2.0, 1e-3)
    noise = np.exp(0.005 * np.random.default_rng(0).normal(size=30))
    found, off = pact.fit_curve(x, truth.loss(x) * noise, kind)
    assert off.shape == x.shape and np.sqrt(np.mean(off**2)) < 0.01
    # What matters is where it leads: from a loss, 2000 samples on.
    ahead = pact.next_loss(found, 1.0, 2000.0), pact.next_loss(truth, 1.0, 2000.0)
    np.testing.assert_allclose(*ahead, rtol=0.03)


def test_a_fit_to_several_runs_lies_between_them():
    x, truth = np.geomspace(50, 5000, 10), pact.PowerLaw(0.3, 8.0, 0.4)
    factors = np.array([0.97, 1.0, 1.02])[:, None]
    runs = factors * truth.loss(x)
    _, off = pact.fit_curve(np.tile(x, (3, 1)), runs)
    # The middle one in the logarithm; what is left is how far each is from it.
    middle = -np.log(factors) + np.log(factors).mean()
    np.testing.assert_allclose(off, np.broadcast_to(middle, off.shape), atol=0.002)
    alone, _ = pact.fit_curve(x, runs[1])
    together, _ = pact.fit_curve(np.tile(x, (3, 1)), np.tile(runs[1], (3, 1)))
    for part in ("floor", "scale", "exponent"):
        same = getattr(alone, part), getattr(together, part)
        np.testing.assert_allclose(*same, rtol=1e-3)
    with pytest.raises(ValueError, match="strictly increasing"):
        pact.fit_curve([x, x[::-1]], runs[:2])
    with pytest.raises(ValueError, match="as many losses"):
        pact.fit_curve(x, runs)


def test_a_fitted_jump_is_within_the_rules_and_close():
    truth = pact.Jump(0.5, 1.5, 2.5)
    before = np.linspace(0.4, 2.4, 8)
    found = pact.fit_jump(before, truth.after(before), 2.5)
    np.testing.assert_allclose(found.after(before), truth.after(before), atol=1e-4)
    helped = pact.fit_jump(before, before - 0.1, 2.5)  # pruning that helped
    assert np.all(helped.after(before) - before < 1e-3)

"""Baselines keep to their rules and are never below the optimum; scripts run."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import slow
from matplotlib.figure import Figure
from pact_cases import small

from gcjax import pact, report
from gcjax.pact import exact, joint, outcomes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import pact_driver  # noqa: E402
import pact_errors  # noqa: E402
import pact_joint  # noqa: E402
import pact_plan  # noqa: E402
import pact_scaling  # noqa: E402
import pact_study  # noqa: E402


@pytest.mark.parametrize("name", pact.BASELINES)
def test_baselines_are_feasible_and_never_below_the_optimum(name):
    found = 0
    for seed in range(900, 930):
        problem = small(seed, 2, 2, 4)
        plan = pact.BASELINES[name](problem)
        if plan is None or not plan.steps:
            continue
        found += 1
        assert pact.feasible(problem, plan)
        assert plan.joules >= exact.brute_force(problem).joules * (1 - 1e-9)
        versions = [step.version for step in plan.steps]
        switches = sum(a != b for a, b in itertools.pairwise(versions))
        if name in ("static", "no compression", "prune at start"):
            assert len({step[:3] for step in plan.steps}) == 1
        if name == "no compression":
            assert set(versions) == {"v0"}
        if name == "one switch":
            assert switches <= 1
    assert found > 0


def test_static_is_the_best_of_all_static_plans():
    for seed in range(900, 910):
        problem = small(seed, 2, 2, 4)
        tables = pact.tabulate(problem)
        best = []
        shape = tables.energy_j.shape
        for m, a, count in itertools.product(
            range(shape[0]), range(shape[2]), range(1, problem.max_epochs + 1)
        ):
            try:
                plan = pact.replay(problem, [(m, a)] * count, tables)
            except ValueError:  # impossible
                continue
            if pact.feasible(problem, plan):
                best.append(plan.joules)
        found = pact.BASELINES["static"](problem)
        assert (found.joules if found else None) == (
            pytest.approx(min(best)) if best else None
        )


def test_the_example_config_plans_and_prints():
    config = report.load_config_file(ROOT / "configs" / "pact_tiers.py").get_config()
    problem = pact.from_config(config)
    plan = pact.plan(problem)
    assert pact.feasible(problem, plan)
    assert plan.joules < pact.BASELINES["static"](problem).joules
    lines = pact_plan.text(plan).splitlines()
    assert len({step.cluster for step in plan.steps}) > 1 and len(lines) > 3
    assert lines[-1].startswith("proved: at most ")
    best = dataclasses.replace(plan, lower_bound_j=plan.joules)
    assert pact_plan.text(best).endswith(
        "proved: the least energy that meets the target"
    )
    figure = Figure()
    outcomes.draw_plan(figure, problem, plan.steps)
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (
        rows
        == [n.name for n in problem.nodes if n.name in {*rows}]
        == ["edge", "phone"]
    )


def test_choices_of_a_plan_replay_to_the_plan():
    config = report.load_config_file(ROOT / "configs" / "pact_tiers.py").get_config()
    problem = pact.from_config(config)
    plan = pact.BASELINES["one switch"](problem)
    tables = pact.tabulate(problem)
    choices = pact.choices_of(problem, plan.steps, tables)
    assert pact.replay(problem, choices, tables).steps == plan.steps


@pytest.mark.parametrize(
    "script",
    [
        pact_study,
        pact_errors,
        slow(pact_joint),
        pact_scaling,
    ],
)
def test_quick_studies_make_records_tables_and_figures(script, tmp_path):
    study, runs = script.STUDY, tmp_path / "runs"
    config = report.load_config_file(ROOT / "configs" / f"{study.name}.py")
    config = config.get_config("quick")
    pact_driver.run(study, config, runs)
    paths = list((runs / study.folder).glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        assert {"git", "versions", "device", "started", "kind", "seed"} < set(record)
    before = [p.stat().st_mtime_ns for p in paths]
    pact_driver.run(study, config, runs)  # nothing is missing
    assert [p.stat().st_mtime_ns for p in paths] == before
    written = pact_driver.write_report(study, runs, tmp_path)
    assert all(p.stat().st_size > 500 for p in written)
    text = written[0].read_text()
    assert "nan" not in text and f"from {len(paths)} records" in text
    assert pact_driver.write_report(study, tmp_path / "none", tmp_path) == []


def test_what_separate_tuning_leaves_of_a_problem():
    problem = pact.with_gradient_levels(pact.scenario("cooperative", 3, 6, 12, 0), 0)
    problem = problem.with_target(max_loss=1.2)
    plan = pact.BASELINES["no compression"](problem)
    assert plan is not None and {s.version for s in plan.steps} == {"d1"}
    kept = joint.keeping_places(problem, plan)
    assert [v.name for v in kept.versions] == ["d1"] and not kept.switches
    used = {s.cluster for s in plan.steps} | {problem.start_cluster}
    assert {c.name for c in kept.clusters} == used
    assert len(kept.gradient_levels) == 4
    assert all(len(g.efficiency) == 1 for g in kept.gradient_levels)
    levels = {s.level for s in plan.steps}
    kept = joint.keeping_levels(problem, plan)
    assert {g.name for g in kept.gradient_levels} == levels


def test_every_way_to_plan_leaves_a_part_of_the_problem():
    problem = pact.with_gradient_levels(pact.scenario("cooperative", 3, 6, 12, 0), 0)
    efficiency = (0.9, 0.8, 0.7)
    clusters = [dataclasses.replace(c, efficiency=efficiency) for c in problem.clusters]
    problem = dataclasses.replace(problem, clusters=tuple(clusters), max_loss=1.2)
    plan = pact.BASELINES["no compression"](problem)
    for way in joint.WAYS:
        asked = []
        left = joint.restricted(
            problem, way, lambda way, a=asked: a.append(way) or plan
        )
        assert set(asked) <= set(joint.WAYS[: joint.WAYS.index(way)])
        # What is left can be carried out in the whole problem, at the same cost.
        part = pact.BASELINES["no compression"](left)
        whole = pact.tabulate(problem)
        again = pact.replay(problem, pact.choices_of(problem, part.steps, whole), whole)
        np.testing.assert_allclose(again.joules, part.joules)
        np.testing.assert_allclose(again.loss, part.loss)
        if way in ("neither", "model only"):
            assert len(left.gradient_levels) == 1
        if way in ("neither", "gradients only"):
            assert not left.switches
    assert joint.restricted(problem, "model, then gradients", lambda _: None) is None
    with pytest.raises(ValueError, match="a way of planning is one of"):
        joint.restricted(problem, "magic", lambda _: None)


def test_gradient_levels_cost_more_progress_the_less_they_send():
    problem = pact.with_gradient_levels(pact.scenario("cooperative", 3, 6, 12, 0), 0)
    for m in range(3):
        sent = [g.up_fraction[m] for g in problem.gradient_levels]
        kept = [g.efficiency[m] for g in problem.gradient_levels]
        assert sent == sorted(sent, reverse=True)
        assert kept == sorted(kept, reverse=True)
    for g in problem.gradient_levels[1:]:  # smaller versions have less to spare
        assert list(g.efficiency) == sorted(g.efficiency, reverse=True)


def test_frugal_nodes_hold_small_versions_only_and_large_ones_start_well():
    for seed in range(3):
        problem = pact.scenario("tiers", 4, 12, 30, seed)
        tables = pact.tabulate(problem)
        mobile = [c.name.startswith("mobile") for c in problem.clusters]
        at_mobile = np.isin(tables.destination, np.flatnonzero(mobile))
        there = tables.possible[:, 0]
        assert not there[0, at_mobile].any() and there[-1, at_mobile].all()
        drops = [2.2 - pact.next_loss(v.curve, 2.2, 1000.0) for v in problem.versions]
        assert drops == sorted(drops, reverse=True)


def test_scenarios_vary_and_wrong_predictors_stay_legal():
    for kind in pact.KINDS:
        problem = pact.scenario(kind, 3, 6, 10, 0)
        tables = pact.tabulate(problem)
        there = tables.possible[-1, 0]
        rates = tables.seconds[-1, 0][there] / tables.progress[-1, 0][there]
        joules = tables.energy_j[-1, 0][there] / tables.progress[-1, 0][there]
        # The fastest way to train the smallest version is not the most frugal one.
        assert rates.argmin() != joules.argmin()
        wrong = pact.perturbed(problem, 0.2, 1)
        assert wrong.versions != problem.versions
        assert pact.perturbed(problem, 0.0, 1) == problem
    with pytest.raises(ValueError, match="kind must be one of"):
        pact.scenario("magic", 3, 6, 10, 0)

"""Versions and gradient levels together: ways to plan, with a measured profile."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gcjax import pact, report
from gcjax.pact import joint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import pact_driver  # noqa: E402
import pact_errors  # noqa: E402
import pact_joint  # noqa: E402
import pact_joint_measured  # noqa: E402
import pact_scaling  # noqa: E402
import pact_study  # noqa: E402

# Planning takes longer without optimisations.
pytestmark = pytest.mark.usefixtures("optimised")


def measured(**changed):
    config = report.load_config_file(ROOT / "configs" / "pact_fashion_joint.py")
    config = config.get_config()
    config.update(changed, profile=str(ROOT / config.profile))
    return config


def test_levels_and_clusters_are_worth_what_was_measured():
    config = measured()
    profile = json.loads(Path(config.profile).read_text())
    (_, problem), *_ = pact_joint_measured.problems(config)
    tables = pact.tabulate(problem)
    samples = np.sum(profile["histograms"])
    several = next(c for c in profile["clusters"] if "+" in c["name"])
    at = [c.name for c in problem.clusters].index(several["name"])
    for a in np.flatnonzero((tables.destination == at) & (tables.fraction == 1.0)):
        level = profile["gradient_levels"][tables.level[a]]
        shares = np.array(several["efficiency"]) * np.array(level["efficiency"])
        np.testing.assert_allclose(tables.progress[:, at, a], samples * shares)


def test_the_planned_study_makes_records_a_table_and_a_figure(tmp_path):
    config = measured(link_rates=(1.0, 0.1), losses=(0.9,), deadlines=(12.0,))
    runs, study = tmp_path / "runs", pact_joint_measured.STUDY
    pact_joint_measured.run(config, runs)
    paths = sorted((runs / study.folder).glob("*.json"))
    assert [p.stem for p in paths] == ["rate_0.1", "rate_1"]
    found = []
    for path in paths:
        (case,) = json.loads(path.read_text())["cases"].values()
        plans = case["plans"]
        assert set(plans) == set(joint.WAYS)
        joules = {way: p["joules"] for way, p in plans.items() if p["joules"]}
        # Up to the planner's own gap.
        assert joules[joint.JOINT] <= 1.02 * min(joules.values())
        found.append(joules[joint.JOINT])
    assert found[0] >= found[1] * 0.98  # slower links are no cheaper
    before = [p.stat().st_mtime_ns for p in paths]
    pact_joint_measured.run(config, runs)  # nothing is missing
    assert [p.stat().st_mtime_ns for p in paths] == before
    table, figure = pact_driver.write_report(study, runs, tmp_path)
    assert "| 0.1 | 0.9 |" in table.read_text() and "nan" not in table.read_text()
    assert figure.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "study", [pact_study, pact_scaling, pact_errors, pact_joint, pact_joint_measured]
)
def test_committed_tables_are_those_of_the_records(study, tmp_path):
    runs = ROOT / "results" / "runs"
    table, *_ = pact_driver.write_report(study.STUDY, runs, tmp_path)
    committed = ROOT / "results" / "tables" / table.name
    assert table.read_bytes() == committed.read_bytes(), "run scripts/report.py"

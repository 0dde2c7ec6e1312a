"""Iterations and seconds to a target, and what is made of them."""

import json

import numpy as np
import pytest

from gcjax import results, study
from gcjax.network import rounds

SPLIT = "skewed(arithmetic(10), 0.5)"


def record(method, seed, accuracy, uploads=(100, 50), every=10):
    """A run of two workers, 3 to 1, whose uploads never change."""
    steps = [every * (i + 1) for i in range(len(accuracy))]
    return {
        "schema": results.SCHEMA,
        "status": "done",
        "method": method,
        "seed": seed,
        "weights": [0.75, 0.25],
        "profile": [[20, 10], [0, 10]],
        "num_params": 100,
        "config": {
            "split": SPLIT,
            "aggregator": "parameter_server()",
            "task": "task",
            "num_workers": 2,
            "batch_size_per_worker": 4,
            "steps": steps[-1],
            "learning_rate": 0.1,
            "eval_every": every,
        },
        "final": {
            "steps": steps[-1],
            "upload_bits": [u * steps[-1] for u in uploads],
            "download_bits": 3200 * steps[-1],
        },
        "series": {
            "eval_step": steps,
            "eval_accuracy": list(accuracy),
            "uploaded": [[u * s for u in uploads] for s in steps],
        },
    }


RISING = np.linspace(0.1, 0.9, 17)  # 0.05 every evaluation


def test_iterations_wait_for_the_median_of_five():
    noisy = RISING.copy()
    noisy[3] = 1.0  # an outlier that reaches nothing by itself
    for accuracy in (RISING, noisy):
        run = record("uniform(0.1)", 0, accuracy)
        assert study.iterations(run, 0.5) == 110  # 0.4 .. 0.6 are evaluations 7 to 11
    assert study.iterations(run, 0.85) is None
    assert study.final(run) == pytest.approx(0.8)


def test_seconds_are_those_of_the_rounds():
    run = record("uniform(0.1)", 0, RISING)
    links = rounds.uneven([0.75, 0.25], "against")
    one = rounds.round_seconds(links, [100, 50], 3200, study.COMPUTE_S)
    assert study.seconds(run, 0.5, "against") == pytest.approx(110 * one)
    assert study.seconds(run, 0.85, "with") is None


def test_differences_within_two_standard_errors_are_ties():
    base = [record("uniform(0.1)", s, RISING) for s in range(3)]
    apart = [record("other", s, RISING + 0.01 + 1e-4 * s) for s in range(3)]
    near = [record("other", s, RISING + 0.01 * (s - 1)) for s in range(3)]
    assert "tie" not in study.verdict(study.paired(apart, base, study.final), 100)
    assert "tie" in study.verdict(study.paired(near, base, study.final), 100)
    assert study.paired(apart[:1], base, study.final) is None
    never = lambda r: None
    assert study.paired(apart, base, never) is None


def test_correlations_rank_allocations_by_their_steps():
    """Where steps grow with omega, omega's rank correlation is one."""
    runs = {}
    for exponent, delay in ((0.5, 0), (0.0, 2), (1.5, 3), (2.0, 6)):
        name = f"power_rule(0.1, {exponent})" if exponent else "uniform(0.1)"
        late = np.concatenate([np.full(delay, 0.1), RISING])
        runs[name] = [record(name, s, late) for s in range(2)]
    runs["dense"] = [record("dense", 0, RISING)]
    layers = "uniform(0.1, per_layer=True)"  # chooses entries in another way
    runs[layers] = [record(layers, 0, RISING)]
    found, count = study.correlations(runs, 0.5, 0.1)
    assert count == 4
    assert found["omega"] == pytest.approx(1.0)
    assert study.correlations({"dense": runs["dense"]}, 0.5, 0.1) is None


def test_intervals_hold_the_mean_and_only_where_all_got_there():
    base = [record("uniform(0.1)", s, RISING) for s in range(5)]
    other = [record("other", s, RISING + 0.01 * (s + 1)) for s in range(5)]
    low, high = map(
        float, study.interval(other, base, study.final, 100)[1:-1].split(",")
    )
    assert 1 <= low < 3 < high <= 5  # the mean gap is 3 points, the gaps 1 to 5
    assert study.interval(other[:2], base, study.final) == "-"
    assert study.interval(other, base, lambda r: None) == "-"


def test_settings_are_told_apart_by_what_differs():
    few, many = record("dense", 0, RISING), record("dense", 0, RISING)
    many["config"]["num_workers"] = 20
    failed = record("dense", 1, RISING) | {"status": "diverged"}
    assert list(study.groups([many, few, failed])) == ["2 workers", "20 workers"]
    assert list(study.groups([few])) == [SPLIT]


def test_targets_traffic_and_time_are_in_the_table():
    late = np.concatenate([np.full(4, 0.1), RISING[:-4]])
    never = np.full(17, 0.1)
    names = {"uniform(0.1)": RISING, "late": late, "never": never}
    runs = [record(n, s, a) for n, a in names.items() for s in range(3)]
    text = study.table("name", runs, 0.1, {}, targets=(0.5,))
    lines = [x for x in text.splitlines() if x.startswith("| `late`")]
    assert "150 ± 0; -36.36 ± 0.00 %" in lines[1]  # 40 steps after 110
    # 170 steps in all, the median reaches 98 % of 0.8 at the last; 150 bits a step.
    uniform = [x for x in text.splitlines() if x.startswith("| `uniform(0.1)`")][0]
    assert uniform.endswith(f"| {170 * 150 / 8e6:.2f} |")
    hopeless = [x for x in text.splitlines() if x.startswith("| `never`")]
    assert "> 170 (3 of 3)" in hopeless[0] and "never (3 of 3)" in hopeless[2]


def test_pareto_names_what_nothing_beats_in_time_and_traffic():
    names = {"uniform(0.1)": 100, "less": 50, "more": 400, "most": 800, "dense": 3200}
    runs = [record(n, 0, RISING, (u, u)) for n, u in names.items()]
    axes = study.pareto(runs, 0.1).axes
    shown = [t.get_text() for t in axes[0].get_legend().get_texts()]
    assert shown == ["less", "uniform(0.1)"]
    assert study.pareto(runs[:3], 0.1) is None


def test_report_is_written_for_experiments_with_weights_only(tmp_path):
    experiment = "dagc_logistic"
    for seed in range(2):
        for method in ("uniform(0.001)", "hard(0.05)"):
            run = record(method, seed, RISING) | {"experiment": experiment}
            path = tmp_path / "runs" / experiment / f"{seed}{method[:4]}.json"
            results.write_json(run, path)
    other = tmp_path / "runs" / "quickstart" / "a.json"
    results.write_json({"schema": results.SCHEMA, "status": "done"}, other)
    written = study.write_report(tmp_path / "runs", tmp_path / "out")
    names = [f"{experiment}.md", f"{experiment}.png", f"{experiment}_split0.png"]
    assert [p.name for p in written] == names
    text = written[0].read_text()
    assert "`hard(0.05)`" in text and SPLIT in text and "80.00 ± 0.00" in text
    assert json.loads(other.read_text())["status"] == "done"

"""Tables and figures from hand-made records, and what a sweep does and skips."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from gcjax import report, results, train

ROOT = Path(__file__).resolve().parents[1]
STEPS, WARMUP, DENSE = 100, 10, 1000.0  # DENSE: bits of a dense step
LGRECO = "lgreco(default=0.01)"
CONFIG = """
import ml_collections

def get_config(arg=None):
    return ml_collections.ConfigDict(dict(
        experiment="toy", task="toys()", aggregator="compressed_mean(top_k())",
        methods=("dense", "uniform(0.01)"), seed=0, every=20, warmup_steps=10,
        num_workers=8, batch_size_per_worker=4, steps=100, optimizer="sgd",
        learning_rate=0.1, data_dir=""))

def sweep(add):
    for seed in (0, 1, 2):
        for method in ("dense", "uniform(0.01)", "lgreco(default=0.01)"):
            add(methods=(method,), seed=seed)
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # importing configs extends it
    path = tmp_path / "configs" / "toy.py"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


def record(method, seed, value=0.9, step_bits=100.0, *, metric="accuracy", **fields):
    """A finished run: `step_bits` bits a step after the dense warm-up."""
    config = dict(
        aggregator="compressed_mean(top_k())",
        methods=[method],
        seed=seed,
        every=20,
        warmup_steps=WARMUP,
        steps=STEPS,
        task="toys()",
        optimizer="sgd",
        learning_rate=0.1,
        num_workers=8,
        batch_size_per_worker=4,
    )
    config |= {k: fields.pop(k) for k in [*fields] if k in config}
    made = {
        "schema": results.SCHEMA,
        "status": "done",
        "method": method,
        "label": method if method == "dense" else f"top_k {method}",
        "seed": seed,
        "config": config,
        "git": {"commit": "abc", "dirty": False},
        "versions": {"jax": "1.2"},
        "device": "cpu",
        "wall_seconds": 60.0,
        "metric": metric,
        "ladder": [0.001 * 2**i for i in range(8)],
        "layers": ["conv/kernel", "dense/kernel"],
        "layer_sizes": [4608, 10240],
    }
    return made | curves(config, metric, value, step_bits) | fields


def curves(config, metric, value, step_bits):
    steps, method = config["steps"], config["methods"][0]
    sent = lambda s: DENSE * min(s, WARMUP) + step_bits * max(0, s - WARMUP)
    default = [5, 5] if method != "dense" else [0, 0]
    series = {
        "step": [*range(10, steps + 1, 10)],
        "total_bits": [sent(s) for s in range(10, steps + 1, 10)],
        "eval_step": [steps // 2, steps],
        "eval_bits": [sent(steps // 2), sent(steps)],
        f"eval_{metric}": [value / 2, value],
        "levels": [[-1, -1], default] + [[1, 7], [2, 6]] * ("lgreco" in method),
        "levels_step": [0, 10] + [20, 40] * ("lgreco" in method),
    }
    final = {
        metric: value,
        "steps": steps,
        "payload_bits": sent(steps) / 2,
        "total_bits": sent(steps),
        "bits_per_step": sent(steps) / steps,
        "compression_ratio": DENSE * steps / sent(steps),
        "compression_ratio_bf16": DENSE * steps / sent(steps) / 2,
    }
    return {"series": series, "final": final}


def failed(method, seed):
    made = record(method, seed)
    made.pop("metric")
    return made | dict(status="failed", error="OSError: gone\nx", series={}, final={})


def save(folder, records):
    for i, r in enumerate(records):
        results.write(r, folder / "toy" / f"{i}.json")
    return folder


def cells(text, *start):
    """The cells of a table's line after those that it starts with."""
    lines = [[c.strip() for c in x.strip("|").split("|")] for x in text.split("\n")]
    n = len(start)
    return [line[n:] for line in lines if line[:n] == list(start)]


def test_summary():
    runs = [
        record("dense", 0, 0.97, DENSE),
        record("uniform(0.01)", 0, 0.96, 100.0),
        record(LGRECO, 0, 0.965, 50.0),
        record(LGRECO, 1, 0.9, 50.0),
        record(LGRECO, 2) | {"status": "diverged"},
        failed("uniform(0.01)", 3),
    ]
    lines = report.summary(runs).split("\n")
    assert len({len(line) for line in lines[:8]}) == 1
    assert lines[2].split()[3:] == ["97.00", "1.00", "kbit", "1.00x", "0.50x", *"--"]
    # Uniform sends 10 * 1000 + 90 * 100 = 19,000 bits, L-GreCo 14,500.
    assert lines[4].split()[-4:] == ["6.90x", "3.45x", "1.31x", "2.00x"]
    assert lines[5].split()[-2:] == ["-", "-"]  # no uniform run with this seed
    assert "diverged" in lines[6] and "failed" in lines[7]
    assert lines[8].endswith("seed 2: diverged after 100 steps")
    assert lines[9].endswith("seed 3: failed; OSError: gone")


@pytest.mark.parametrize("warmup, expected", [(0, 100), (10, 90), (15, 80), (300, 0)])
def test_after_warmup(warmup, expected):
    run = record(LGRECO, 0, step_bits=50.0, warmup_steps=warmup)
    steps, bits = report.after_warmup(run)
    assert (steps, bits) == (expected, 50 * expected + 9500 * (warmup == 0))
    ratio = report.ratio_after_warmup(run)
    if warmup in (10, 15):  # the log has lines at multiples of 10
        assert ratio == pytest.approx(20)
    assert (ratio is None) == (warmup == 300)


@pytest.mark.parametrize(
    "bits, text",
    [(0, "0.00 bit"), (999, "999 bit"), (999.9, "1.00 kbit"), (2.5e9, "2.50 Gbit")],
)
def test_human_bits(bits, text):
    assert report.human_bits(bits) == text


def test_partners_differ_only_in_how_gradients_travel():
    run = record(LGRECO, 0)
    others = [
        record("uniform(0.01)", 1),
        record("uniform(0.02)", 0),
        record("uniform(0.01)", 0, learning_rate=0.2),
        record("uniform(0.01)", 0, aggregator="compressed_mean(qsgd())"),
        record("uniform(0.01)", 0, status="diverged"),
        record("dense", 0, steps=50),
    ]
    assert report.partner(run, others, "uniform") is None
    assert report.partner(run, others, "dense") is None
    # When levels are selected matters to neither of them.
    good = [record("uniform(0.01)", 0, every=7), record("dense", 0, every=7)]
    assert report.partner(run, others + good, "uniform") is good[0]
    assert report.partner(run, others + good, "dense") is good[1]


def test_paired_differences(config_file):
    runs = []
    for seed, uniform, lgreco in (0, 0.50, 0.51), (1, 0.60, 0.62), (2, 0.70, 0.695):
        runs += [record("uniform(0.01)", seed, uniform), record(LGRECO, seed, lgreco)]
    runs.append(record("dense", 1, 0.64))
    text = report.table("toy", runs, config_file)
    found = cells(text, "top_k", f"`{LGRECO}`", "uniform")
    assert found == [["3", "+0.83", "[-0.50, +2.00]", "mixed"]]
    found = cells(text, "top_k", f"`{LGRECO}`", "dense")
    assert found == [["1", "-2.00", "[-2.00, -2.00]", "inconclusive"]]
    found = cells(text, "top_k", "`uniform(0.01)`", "dense")
    assert found == [["1", "-4.00", "[-4.00, -4.00]", "inconclusive"]]
    assert not cells(text, "", "`dense`", "dense")
    # Mean and standard deviation, which pairs do not need.
    assert cells(text, "top_k", "`uniform(0.01)`", "3 of 3")[0][0] == "60.00 ± 10.00"


@pytest.mark.parametrize(
    "metric, verdict", [("accuracy", "better"), ("perplexity", "worse")]
)
def test_verdict_knows_which_way_is_up(metric, verdict, tmp_path):
    runs = [record("dense", s, 0.5, metric=metric) for s in range(3)]
    runs += [record("uniform(0.01)", s, 0.6, metric=metric) for s in range(3)]
    text = report.table("toy", runs, tmp_path / "none.py")
    assert cells(text, "top_k", "`uniform(0.01)`", "dense", "3")[0][-1] == verdict


def test_gains(config_file):
    runs = [record("uniform(0.01)", 0, step_bits=100.0)]
    runs += [record(LGRECO, 0, step_bits=50.0)]
    line = cells(report.table("toy", runs, config_file), "top_k", f"`{LGRECO}`")[0]
    assert line[2:] == [
        *("72.5 bit", "145 bit", "6.90x", "3.45x", "20.00x", "1.31x", "2.00x", "100")
    ]


def test_missing_failed_and_diverged_runs_are_seen(config_file):
    runs = [record("dense", s, 0.7 + s / 100) for s in (0, 1)]
    runs += [record("uniform(0.01)", 0, status="diverged"), failed("uniform(0.01)", 1)]
    text = report.table("toy", runs, config_file)
    assert text.startswith("<!-- Generated by `python scripts/report.py` from 4 record")
    assert "Not run yet: 5 of the runs" in text
    assert cells(text, "", "`dense`")[1] == ["70.00", "71.00", "not run"]
    uniform = cells(text, "top_k", "`uniform(0.01)`")
    assert uniform[0][:2] == ["0 of 3", "diverged / failed / not run"]
    assert uniform[-1] == ["diverged", "failed", "not run"]
    assert cells(text, "top_k", f"`{LGRECO}`")[0][:2] == ["0 of 3", "not run"]
    assert cells(text, "top_k", f"`{LGRECO}`")[-1] == ["not run"] * 3
    assert "- top_k uniform(0.01), seed 0: diverged after 100 steps\n" in text
    assert "- top_k uniform(0.01), seed 1: failed; OSError: gone\n" in text


def test_shortened_runs_stay_apart(config_file):
    runs = [record("dense", s) for s in range(3)] + [record("dense", 0, steps=50)]
    text = report.table("toy", runs, config_file)
    assert "`dense`* differs from the config: steps 50 instead of 100." in text
    assert cells(text, "", "`dense`")[0][0] == "3 of 3"
    assert cells(text, "", "`dense`*")[0][0] == "1 of 1"
    # Fields that configs have got since do not make an old record another run.
    grown = config_file.read_text().replace("steps=100", "steps=100, new_field=3")
    config_file.write_text(grown)
    assert report.table("toy", runs, config_file) == text


def test_figures(tmp_path, config_file):
    runs = [
        record(method, s, 0.8 + s / 100)
        for s in (0, 1)
        for method in ("dense", "uniform(0.01)", LGRECO)
    ]
    runs += [record(LGRECO, 2, status="diverged"), failed("uniform(0.01)", 2)]
    written = report.figures(
        save(tmp_path / "runs", runs), tmp_path, config_file.parent
    )
    assert [p.name for p in written] == ["toy_metric.png", "toy_levels.png"]
    for name, shown in ("all", runs), ("still", runs[:2]), ("bad", runs[-1:]):
        path = tmp_path / "new" / f"{name}.png"
        report.run_figure(shown, path)
        written.append(path)
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in written)
    assert all(p.stat().st_size > 5000 for p in written)


def test_tables_of_a_folder(tmp_path, config_file):
    runs = save(tmp_path / "runs", [record("dense", 0), record(LGRECO, 0)])
    (path,) = report.tables(runs, tmp_path / "a", config_file.parent)
    assert path == tmp_path / "a" / "tables" / "toy.md"
    (again,) = report.tables(runs, tmp_path / "b", config_file.parent)
    assert path.read_bytes() == again.read_bytes()


def test_committed_tables_are_those_of_the_records(tmp_path):
    if not list((ROOT / "results" / "runs").glob("*/*.json")):
        pytest.skip("no records are committed")
    written = report.tables(ROOT / "results" / "runs", tmp_path)
    committed = ROOT / "results" / "tables"
    for path in written:
        same = path.read_bytes() == (committed / path.name).read_bytes()
        assert same, f"run scripts/report.py: {path.name} is not up to date"


def test_no_record_names_a_folder_of_a_machine():
    config = report.load_config_file(ROOT / "configs" / "quickstart.py").get_config()
    config.data_dir = "/somebody/data"
    assert "somebody" not in json.dumps(results.new_record(config, "dense"))


# The sweep.


@pytest.fixture
def sweeper(monkeypatch):
    """The script, with a training that takes no time."""
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "scripts/sweep.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    module.trained, module.endings = [], {}

    def fake_train(config, method, workdir):
        run = (method, config.seed)
        module.trained.append(run)
        ending = module.endings.get(run, "done")
        if ending is KeyboardInterrupt:
            raise ending
        made = record(method, config.seed, status=ending)
        made["error"] = "OSError: no /home/me/data.npz or http://a.b/c"
        results.write(made, workdir / "record.json")
        if ending == "failed":
            raise OSError("no data")

    monkeypatch.setattr(train, "train", fake_train)
    return module


@pytest.fixture
def runs(config_file):
    module = report.load_config_file(config_file)
    return report.sweep_runs(module.get_config(), module)


def test_sweep_skips_what_is_recorded(sweeper, runs, tmp_path, capsys):
    folder, work = tmp_path / "runs", tmp_path / "work"
    sweeper.endings = {("dense", 1): "diverged"}
    assert sweeper.sweep(runs, folder, work, max_runs=4) == 0
    first = [("dense", 0), ("uniform(0.01)", 0), (LGRECO, 0), ("dense", 1)]
    assert sweeper.trained == first
    assert "run 4 of 4, about 1 min left: dense, seed 1" in capsys.readouterr().out
    assert sweeper.sweep(runs, folder, work) == 0
    assert len(sweeper.trained) == len(set(sweeper.trained)) == 9
    assert len(list((folder / "toy").glob("*.json"))) == 9
    assert sweeper.sweep(runs, folder, work) == 0
    assert len(sweeper.trained) == 9


def test_sweep_goes_on_after_a_failure(sweeper, runs, tmp_path, capsys):
    folder, work = tmp_path / "runs", tmp_path / "work"
    sweeper.endings = {("dense", 0): "failed"}
    assert sweeper.sweep(runs[:2], folder, work) == 1
    path = sweeper.record_path(runs[0], folder)
    kept = results.read(path)
    assert kept["status"] == "failed"
    assert kept["error"] == "OSError: no data.npz or http://a.b/c"
    assert "failed: OSError: no data" in capsys.readouterr().err
    sweeper.endings = {}
    assert sweeper.sweep(runs[:2], folder, work) == 0
    assert sweeper.trained[2:] == [("dense", 0)]
    assert results.read(path)["status"] == "done"


def test_sweep_leaves_no_record_of_an_interrupted_run(sweeper, runs, tmp_path):
    sweeper.endings = {("uniform(0.01)", 0): KeyboardInterrupt}
    with pytest.raises(KeyboardInterrupt):
        sweeper.sweep(runs, tmp_path / "runs", tmp_path / "work")
    names = [p.name for p in (tmp_path / "runs" / "toy").glob("*")]
    assert names == [results.file_name(*runs[0])]


def test_shards_are_disjoint_and_complete(sweeper, runs):
    halves = [sweeper.shard(runs, f"{i}/2") for i in (0, 1)]
    assert sorted(map(sweeper.describe, sum(halves, []))) == sorted(
        map(sweeper.describe, runs)
    )
    for text in ("2/2", "1", "0/0", "-1/2"):
        with pytest.raises(ValueError, match="shard"):
            sweeper.shard(runs, text)


def test_sweep_wants_one_method_and_known_fields(config_file):
    module = report.load_config_file(config_file)
    config = module.get_config()
    for overrides, error in (
        (dict(methods=("dense",) * 2), ValueError),
        (
            dict(sed=1),
            KeyError,
        ),
    ):
        module.sweep = lambda add, o=overrides: add(**o)
        with pytest.raises(error):
            report.sweep_runs(config, module)
    del module.sweep  # then there is one run for each of the config's methods
    assert [m for _, m in report.sweep_runs(config, module)] == [*config.methods]


def test_aggregators_of_one_family_are_told_apart(config_file):
    other = "compressed_mean(top_k(exact))"
    runs = [record("uniform(0.01)", 0), record("uniform(0.01)", 0, aggregator=other)]
    text = report.table("toy", runs, config_file)
    assert f"| `{other}` | `uniform(0.01)` | 1 of 1 |" in text
    assert "| `compressed_mean(top_k())` | `uniform(0.01)` |" in text
    alone = report.table("toy", runs[:1], config_file)
    assert "| top_k | `uniform(0.01)` |" in alone

"""The benchmark beside PyTorch: its table says what the records hold."""

import sys
from pathlib import Path

import numpy as np
import pytest

import gcjax
from gcjax import experiment

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _network_measure as measure  # noqa: E402
import _network_report as report  # noqa: E402
import _network_worker as shared  # noqa: E402


def row(side, method, ms, declared):
    made = {"side": side, "method": method, "call": "c", "ms": ms, "loss": 1.0}
    return made | {"declared_bytes": declared, "interface_bytes": 500 + 2 * declared}


@pytest.fixture
def record():
    rows = [
        row("gcjax", "none", [10.0, 12.0, 8.0], 0),
        row("gcjax", "dense f32", [110.0, 100.0, 120.0], 4000),
        row("gcjax", "bf16", [60.0] * 3, 2000),
        row("gcjax", "4 bits", [9.0, 11.0, 10.5], 500),  # lost in the spread
        row("gcjax", "8 bits", [35.0] * 3, 1000),
        row("torch", "none", [20.0] * 3, 0),
        row("torch", "dense f32", [70.0] * 3, 4000),
        row("torch", "fp16", [40.0] * 3, 2000),
    ]
    made = {"model": "mlp", "rate": "1gbit", "network": "namespaces", "device": "d"}
    made |= {"started": "2026-01-01T00:00:00Z", "versions": {}, "settings": {}}
    return made | {"rows": rows}


def test_exchanges_are_steps_less_the_own_step_without(record):
    lines = {line[0]: line for line in report._times(report.rows_of(record))}
    head = lines["method"]
    cell = lambda method, column: lines[method][head.index(column)]
    assert cell("dense f32", "gcjax step") == "110 (105-115)"
    assert cell("dense f32", "gcjax exchange") == "100"
    assert cell("dense f32", "PyTorch exchange") == "50.0"
    assert cell("dense f32", "gcjax/torch") == "2.00"
    assert cell("fp16", "gcjax/torch") == "2.50"  # our bf16 is its partner
    assert cell("8 bits", "vs f32") == "4.00" and cell("8 bits", "vs bf16") == "2.00"
    assert cell("4 bits", "vs f32") == "-"


def test_bytes_are_fitted(record):
    (line,) = report._fits([report.rows_of(record)])  # the other side has two sizes
    assert line.startswith("- gcjax: interface = 500 B + 2.0000 x declared")


def test_report_holds_every_record(record, tmp_path):
    for rate in ("1gbit", "10mbit"):
        name = f"mlp-{rate}.json"
        measure.write(record | {"rate": rate}, tmp_path / "runs/bench_network" / name)
    table, figure = report.write_report(tmp_path / "runs", tmp_path)
    text = table.read_text()
    assert text.index("parameters, 1gbit") < text.index("parameters, 10mbit")
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize("name", [n for n, m in measure.METHODS.items() if m.gcjax])
def test_our_methods_can_be_called(name):
    if name == "none":
        return
    names = experiment.AGGREGATORS | experiment.SELECTORS | {"adapt": gcjax.adapt}
    made = experiment.call(measure.METHODS[name].gcjax, names, "method")
    assert isinstance(made, gcjax.Aggregator)


def test_models_have_the_sizes_that_the_table_names():
    for model, size in (("mlp", 2_383_370), ("cnn", 620_362)):
        params = shared.init(model)
        assert sum(x.size for p in params.values() for x in p.values()) == size


def test_workers_see_batches_of_their_own_with_the_same_labelling():
    (x, y), (other, _) = shared.batches("mlp", 0)[0], shared.batches("mlp", 1)[0]
    assert x.shape == (32, 784) and not np.array_equal(x, other)
    again = shared.batches("mlp", 0)[0]
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])

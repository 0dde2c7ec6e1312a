"""The record of a run: one JSON file with all that a table needs, and no more."""

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import flax
import jax
import ml_collections
import numpy as np
import optax

from gcjax.base import Words

SCHEMA = 1
_POINTS = 400  # of a series at most, to keep committed records small
# Fields that configs got after the first records, left out where they change nothing.
_LATER = {"split": "", "local_steps": 0}
# Fields that say where and how long, not what: two runs that differ only here are one.
_NOT_HASHED = ("seed", "data_dir", "resume", "log_every", "checkpoint_every")


def payload_bits(words: Words) -> int:
    """Bits that one worker contributed to collectives, uploads on average."""
    down = {"downloaded": np.int32(0)}
    return round(32 * sum(float(np.mean(w)) for w in words._replace(**down)))


def wire_bits(words: Words, num_workers: int) -> float:
    """Bits that one worker sends, by the collectives' usual algorithms.

    Of S bits all-gather sends (N - 1) S, a ring all-reduce 2 (N - 1) / N S, all-to-all
    (N - 1) / N S, a permutation S. Of uploads it is the mean over workers. What a
    server sends is not in it.
    """
    n, w = num_workers, words._replace(uploaded=np.mean(words.uploaded))
    shared = (n - 1) * (int(w.gathered) + 2 / n * int(w.reduced) + int(w.scattered) / n)
    return 32 * (shared + int(w.permuted) + float(w.uploaded))


def new_record(config: ml_collections.ConfigDict, method: str) -> dict[str, Any]:
    """A record as it is when its run starts; `status` is "running"."""
    return {
        "schema": SCHEMA,
        "status": "running",
        "experiment": config.experiment,
        "method": method,
        "label": label(config, method),
        "seed": config.seed,
        # Without the data's place: paths of a machine are not to be committed.
        "config": json.loads(config.to_json()) | {"methods": [method], "data_dir": ""},
        "config_hash": config_hash(config, method),
        **provenance(),
        "series": {},
        "final": {},
    }


def provenance() -> dict[str, Any]:
    """With what, where and when a record is made: its code, versions and device."""
    return {
        "git": _git(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
        },
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} host cores",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def label(config: ml_collections.ConfigDict, method: str) -> str:
    """Short name of a method in tables: the compressor's family and the selector."""
    if method == "dense":
        return "dense"
    if config.aggregator.startswith("parameter_server("):
        options = config.aggregator.removeprefix("parameter_server(").removesuffix(")")
        return " ".join([method, options]).strip()
    family = config.aggregator.removeprefix("compressed_mean(").split("(")[0]
    return f"{family} {method}"


def config_hash(config: ml_collections.ConfigDict, method: str) -> str:
    """Eight hex digits of all that matters to a run's result but its seed."""
    fields = json.loads(config.to_json()) | {"methods": [method]}
    kept = {k: v for k, v in fields.items() if k not in _NOT_HASHED}
    kept = {k: v for k, v in kept.items() if k not in _LATER or v != _LATER[k]}
    if not fields.get("local_steps"):
        kept.pop("local_learning_rate", None)
    weighted = config.aggregator.startswith("parameter_server(")
    if method == "dense" and not weighted:  # how and when to compress is no part of it
        kept = {k: v for k, v in kept.items() if k not in ("aggregator", "every")}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def slug(text: str) -> str:
    """A label as part of a file name."""
    text = text.replace("'", "").replace("default=", "")
    safe = "".join(c if c.isalnum() or c in ".-" else "_" for c in text)
    return "_".join(part for part in safe.split("_") if part)


def file_name(config: ml_collections.ConfigDict, method: str) -> str:
    """Name of a committed record."""
    name = slug(label(config, method))
    return f"{name}-s{config.seed}-{config_hash(config, method)}.json"


def write(record: dict[str, Any], path: Path) -> None:
    """Writes a record, its long series thinned out, in one move."""
    out = record | {"series": {k: thin(v) for k, v in record["series"].items()}}
    write_json(out, path)


def write_json(value: Any, path: Path) -> None:
    """Writes JSON in one move, so that no reader finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_finite(value), indent=1) + "\n")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
      ValueError: if the file is no record, or one of another schema.
    """
    try:
        record = json.loads(path.read_text())
        schema = record["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of a run: {error}") from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this code reads {SCHEMA}")
    return record


def thin(points: list) -> list:
    """Keeps at most 400 points, evenly spread, the first and the last among them."""
    if len(points) <= _POINTS:
        return points
    at = np.unique(np.linspace(0, len(points) - 1, _POINTS).round().astype(int))
    return [points[i] for i in at]


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become their names."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return float(f"{value:.7g}") if abs(value) < 1e7 else value
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _git() -> dict[str, Any]:
    def run(*args: str) -> str:
        return subprocess.run(
            ["git", *args],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        dirty = bool(run("status", "--porcelain", "--untracked-files=no", "--", ".."))
        return {"commit": run("rev-parse", "HEAD")[:12], "dirty": dirty}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}

"""Test accuracy against wall-clock seconds, over links with a limited rate.

    python scripts/bench_time_to_accuracy.py --config=configs/slow_network.py
    python scripts/bench_time_to_accuracy.py --config=configs/slow_network.py --report

Does the runs of the config's sweep that have no record yet, each by scripts/launch.py
as one process for each worker, and draws the figure. Needs root. Ctrl-C stops; what is
recorded by then is skipped the next time.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gcjax import command, report, results  # noqa: E402


def overrides(config, asked) -> list[str]:
    """Flags that turn the config of the file into the one of a run."""
    changed = [k for k in config if config[k] != asked[k]]
    return [f"--config.{k}={asked[k]}" for k in changed]


def do(config_file: str, config, asked, method: str, path: Path) -> None:
    """Does one run in processes of its own and puts its record in place.

    Raises:
      OSError: if it failed.
    """
    launch = [sys.executable, str(ROOT / "scripts/launch.py")]
    launch += [f"--processes={asked.num_workers}", f"--rate={flags.FLAGS.rate}"]
    with tempfile.TemporaryDirectory() as workdir:
        train = [str(ROOT / "scripts/train.py"), f"--config={config_file}"]
        train += [f"--workdir={workdir}", *overrides(config, asked)]
        done = subprocess.run([*launch, "--", *train], env=os.environ | SETTINGS)
        if done.returncode:
            raise OSError(f"{results.label(asked, method)}: launch.py has failed")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(workdir) / "record.json", path)


# As in bench_network.py: one compute thread for each process, memory that is kept.
SETTINGS = {
    "NPROC": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


def figure(records: list[dict], rate: str) -> Figure:
    """The test metric against seconds of training, a line for each record."""
    drawn = Figure(figsize=(8, 5), layout="constrained")
    ax = drawn.subplots()
    for i, record in enumerate(records):
        values = np.array(record["series"][f"eval_{record['metric']}"], float)
        dense = record["method"] == "dense"
        ax.plot(
            record["eval_seconds"],
            100 * values if record["metric"] == "accuracy" else values,
            color="black" if dense else report.COLOURS[i % len(report.COLOURS)],
            ls="--" if dense else "-",
            marker="xosD^vP*"[i % 8],
            ms=4,
            label=record["label"],
        )
    ax.set_xscale("log")
    ax.set(xlabel="seconds of training", ylabel="test " + records[0]["metric"])
    ax.set_title(f"{records[0]['config']['num_workers']} workers, links of {rate}")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize="small")
    return drawn


def write_report(runs: Path, out: Path) -> list[Path]:
    """Draws `figures/slow_network_seconds.png` if there are records; returns paths."""
    paths = sorted((runs / "slow_network").glob("*.json"))
    if not paths:
        return []
    path = out / "figures" / "slow_network_seconds.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure([results.read(p) for p in paths], "100 Mbit/s").savefig(path, dpi=120)
    return [path]


def main() -> None:
    """Does what is not recorded, then draws."""
    given, config = flags.FLAGS, flags.FLAGS.config
    file = config_flags.get_config_filename(given["config"])
    runs = report.sweep_runs(config, report.load_config_file(Path(file)))
    folder = Path(given.runs) / config.experiment
    paths = [folder / results.file_name(*run) for run in runs]
    for i, (run, path) in enumerate(zip(runs, paths, strict=True)):
        if given.report or path.exists():
            continue
        print(f"run {i + 1} of {len(runs)}: {results.label(*run)}", flush=True)
        try:
            do(file, config, *run, path)
        except KeyboardInterrupt:
            sys.exit("stopped; the next call goes on with the run that was stopped")
    for path in write_report(Path(given.runs), Path(given.out)):
        print(path)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Path of a config file.")
    flags.DEFINE_string("rate", "100mbit", "Rate of each worker's link.")
    flags.DEFINE_bool("report", False, "Only draw the figure.")
    flags.DEFINE_string("runs", "results/runs", "Folder of records.")
    flags.DEFINE_string("out", "results", "Folder of figures/.")
    flags.mark_flag_as_required("config")
    command.run(main)

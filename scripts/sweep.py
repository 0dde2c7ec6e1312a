"""Does the runs of an experiment that have no record yet, one after the other.

python scripts/sweep.py --config=configs/lgreco_cifar10.py --max_runs=3

Two processes share a sweep with --shard=0/2 and --shard=1/2. Ctrl-C stops; what is
recorded by then is skipped the next time. The exit status is 1 if a run has failed.
"""

import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

# Configs import each other as `configs.base`, wherever the command is given.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import command, report, results  # noqa: E402
from gcjax.pact import execution  # noqa: E402

Run = tuple[ml_collections.ConfigDict, str]  # a config and a method


def record_path(run: Run, runs_dir: Path) -> Path:
    """Where the record of a run belongs."""
    return runs_dir / run[0].experiment / results.file_name(*run)


def is_recorded(path: Path) -> bool:
    """Whether a run need not be done again; a failed one must."""
    return path.exists() and results.read(path)["status"] in ("done", "diverged")


def shard(runs: list[Run], text: str) -> list[Run]:
    """The part "i/n" of the runs: every n-th one, from the i-th on.

    Of all runs, recorded or not: processes that start at different times must agree
    on who does what.

    Raises:
      ValueError: if the text does not read so, or i is not below n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard must be i/n with 0 <= i < n, got {text!r}")
    return runs[int(match[1]) :: int(match[2])]


def sweep(
    runs: list[Run], runs_dir: Path, workdir: Path, max_runs: int | None = None
) -> int:
    """Does the runs that are not recorded, `max_runs` at most.

    Args:
      runs: From `report.sweep_runs`.
      runs_dir: Records are written to runs_dir/<experiment>/.
      workdir: Folder for logs and checkpoints, one subfolder for each run.
      max_runs: None for no limit.

    Returns:
      The number of runs that failed.
    """
    seconds = [_seconds(record_path(run, runs_dir)) for run in runs]
    todo = [run for run, known in zip(runs, seconds, strict=True) if known is None]
    seconds = [s for s in seconds if s is not None]
    print(f"{len(runs)} runs, {len(seconds)} of them recorded")
    todo, failed = todo[:max_runs], 0
    for i, run in enumerate(todo):
        path = record_path(run, runs_dir)
        if is_recorded(path):  # by another process, meanwhile
            continue
        minutes = statistics.fmean(seconds) * (len(todo) - i) / 60 if seconds else None
        left = (
            "time left unknown" if minutes is None else f"about {minutes:.0f} min left"
        )
        print(f"run {i + 1} of {len(todo)}, {left}: {describe(run)}", flush=True)
        if do(run, path, workdir / path.stem):
            seconds.append(_seconds(path))
        else:
            failed += 1
        jax.clear_caches()  # or the compiled steps of all runs stay in memory
    return failed


def do(run: Run, path: Path, workdir: Path) -> bool:
    """Does one run and puts its record in place; False if it has failed."""
    try:
        execution.trainer_for(run[0])(*run, workdir)
    except Exception as error:  # the others may still succeed
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
    made = workdir / "record.json"
    if not made.exists():
        return False
    record = results.read(made)
    if record["status"] == "failed":
        record["error"] = without_folders(record["error"])
        results.write(record, path)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made, path)
    return True


def without_folders(text: str) -> str:
    """Takes the folders out of absolute paths, which say more of a machine than of us.

    >>> without_folders("no file /home/me/data/x.npz")
    'no file x.npz'
    """
    return re.sub(r"(?<![\w:/])/(?:[^\s/'\",:;()]+/)+", "", text)


def describe(run: Run) -> str:
    """A run in one line."""
    return f"{results.label(*run)}, seed {run[0].seed}"


def _seconds(path: Path) -> float | None:
    return results.read(path)["wall_seconds"] if is_recorded(path) else None


def main() -> None:
    """Expands the config's sweep and does it."""
    given, runs_dir = flags.FLAGS, Path(flags.FLAGS.runs)
    file = config_flags.get_config_filename(given["config"]).split(":")[0]
    runs = report.sweep_runs(given.config, report.load_config_file(Path(file)))
    runs = shard(runs, given.shard)
    if given.dry_run:
        for run in runs:
            done = is_recorded(record_path(run, runs_dir))
            print("recorded  " if done else "to do     ", describe(run))
        return
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(given.workdir or temporary)
        try:
            failed = sweep(runs, runs_dir, workdir, given.max_runs)
        except KeyboardInterrupt:
            sys.exit("stopped; the next call goes on with the run that was stopped")
    if failed:
        sys.exit(f"{failed} runs failed; the next call tries them again")


if __name__ == "__main__":
    # Here and not above, so that a test can import the functions next to train.py's.
    config_flags.DEFINE_config_file("config", None, "Path of a config file.")
    flags.DEFINE_string("runs", "results/runs", "Folder of records.")
    flags.DEFINE_string("workdir", None, "Folder for logs; default: a temporary one.")
    flags.DEFINE_bool("dry_run", False, "Only list the runs.")
    flags.DEFINE_integer("max_runs", None, "Stop after this many runs.", lower_bound=1)
    flags.DEFINE_string("shard", "0/1", "i/n: do every n-th run, from the i-th on.")
    flags.mark_flag_as_required("config")
    command.run(main)

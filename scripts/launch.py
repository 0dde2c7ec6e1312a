"""Starts a script as several processes on this machine, over limited links if wanted.

python scripts/launch.py --processes=4 --rate=100mbit -- \
    scripts/train.py --config=configs/quickstart.py --config.num_workers=4

If a process dies, the launcher names it, ends the others and exits with its status.
With --config.checkpoint_every=50 --config.resume=true the same command then continues
from the last checkpoint, to the result of an undisturbed run; with another number of
processes errors are folded so that their mean is kept. Network namespaces vanish with
the launcher, whatever ends it.
"""

import sys
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import cluster, command  # noqa: E402

PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
RATE = flags.DEFINE_string(
    "rate",
    None,
    "Limit of each process's network link, such as 100mbit, or unlimited; needs root. "
    "Default: the host's own network.",
)


def main(argv: list[str]) -> None:
    """Runs the command after --, and exits with its status."""
    sys.exit(cluster.launch(argv, PROCESSES.value, RATE.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("processes")
    command.run(main, takes_words=True)

"""Starts a script as several processes on this machine, over limited links if wanted.

python scripts/launch.py --processes=4 --rate=100mbit -- \
    scripts/train.py --config=configs/quickstart.py --config.num_workers=4
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

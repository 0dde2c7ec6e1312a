"""Writes all tables and figures from the committed records, and nothing else does.

python scripts/report.py
"""

import sys
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _network_report  # noqa: E402
import bench_codecs  # noqa: E402
import bench_time_to_accuracy  # noqa: E402
import bench_uploads  # noqa: E402
import pact_driver  # noqa: E402
import pact_errors  # noqa: E402
import pact_joint  # noqa: E402
import pact_joint_measured  # noqa: E402
import pact_scaling  # noqa: E402
import pact_study  # noqa: E402

from gcjax import command, report, study  # noqa: E402
from gcjax.pact import outcomes  # noqa: E402


def main() -> None:
    """Writes tables and figures for every experiment that has records."""
    runs, out = Path(flags.FLAGS.runs), Path(flags.FLAGS.out)
    written = report.tables(runs, out) + report.figures(runs, out)
    others = (study, bench_codecs, _network_report, bench_time_to_accuracy)
    for other in (*others, bench_uploads, outcomes):
        written += other.write_report(runs, out)
    planned = pact_study, pact_errors, pact_joint, pact_joint_measured, pact_scaling
    for script in planned:
        written += pact_driver.write_report(script.STUDY, runs, out)
    for path in written:
        print(path)


if __name__ == "__main__":
    flags.DEFINE_string("runs", "results/runs", "Folder of records.")
    flags.DEFINE_string("out", "results", "Folder of tables/ and figures/.")
    command.run(main)

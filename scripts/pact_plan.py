"""Prints the plan of least energy for a problem.

    python scripts/pact_plan.py --config=configs/pact_tiers.py
    python scripts/pact_plan.py --config=configs/pact_tiers.py --solver=labels
    python scripts/pact_plan.py --config=configs/pact_tiers.py --figure=plan.png

Runs of equal epochs are one line. The last line says how far the plan may be above the
optimum, as far as that was proved.
"""

import itertools
import sys
from pathlib import Path

from absl import flags
from matplotlib.figure import Figure
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gcjax import command, pact  # noqa: E402
from gcjax.pact import outcomes  # noqa: E402


def text(plan: pact.Plan) -> str:
    """The plan as a table."""
    lines = [f"{'epochs':>7}  version  cluster  data  gradients  loss  s  J"]
    number = 0
    for what, group in itertools.groupby(plan.steps, key=lambda s: s[:4]):
        run = list(group)
        last = run[-1]
        version, cluster, fraction, level = what
        lines.append(
            f"{number + 1:>3}-{number + len(run):<3}  {version}  {cluster}  "
            f"{100 * fraction:g} %  {level}  {last.loss:.4f}  {last.seconds:.4g}  "
            f"{last.joules:.4g}"
        )
        number += len(run)
    lines.append(
        f"loss {plan.loss:.4f}, {plan.seconds:.4g} s, {plan.joules:.4g} J, "
        f"{len(plan.steps)} epochs; {plan.solver} in {plan.cpu_s:.2f} CPU s"
    )
    if plan.lower_bound_j:
        gap = 100 * max(0.0, plan.joules / plan.lower_bound_j - 1)
        least = "the least energy that meets the target"
        above = f"at most {gap:.2f} % above {least}" if gap > 1e-4 else least
        lines.append(f"proved: {above}")
    return "\n".join(lines)


def main() -> None:
    """Reads the problem, plans and prints."""
    problem = pact.from_config(CONFIG.value)
    plan = pact.plan(problem, flags.FLAGS.solver, progress=True)
    print(text(plan))
    if flags.FLAGS.figure:
        figure = Figure(layout="constrained")
        outcomes.draw_plan(figure, problem, plan.steps)
        figure.savefig(flags.FLAGS.figure, dpi=120)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
    flags.DEFINE_string("figure", None, "Also draw the plan into this file.")
    flags.DEFINE_enum("solver", "bucket", pact.SOLVERS, "How to plan.")
    command.run(main)

"""Steps of gcjax and of PyTorch's DDP, side by side, over links with limited rates.

    python scripts/bench_network.py                # all; needs root and PyTorch
    python scripts/bench_network.py --quick        # smoke run over loopback, no root
    python scripts/bench_network.py --report       # table and figure from the records

Four processes on each side, one for each worker, in four network namespaces; the other
side's processes wait meanwhile. Same models, parameters, batches and optimizer (SGD);
one compute thread in each process, the same malloc settings. Rates are visited one
after the other, and at each rate all methods in every round, gcjax and PyTorch
alternating. Building, compiling and warming up happen before, without a limit.

A step's time is the wall clock of a rank from the call to the result, without a
barrier, and its median over ranks. The exchange is a step less the median step without
exchange of the same side, model and rate.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _network_measure import (  # noqa: E402
    METHODS,
    MODELS,
    PROCESSES,
    RATES,
    SCRIPTS,
    Loopback,
    Plan,
    bench,
    write,
)
from _network_report import write_report  # noqa: E402

from gcjax import cluster, command  # noqa: E402


def chosen(flag: str, allowed: Iterable[str]) -> list[str]:
    """The values of a list flag, in their usual order.

    Raises:
      ValueError: for one that is not allowed.
    """
    given, allowed = flags.FLAGS[flag].value, list(allowed)
    for value in given:
        if value not in allowed:
            raise ValueError(f"--{flag}: {value!r} is none of {', '.join(allowed)}")
    return [value for value in allowed if value in given]


def main() -> None:
    """Measures, then writes table and figure."""
    given = flags.FLAGS
    runs, out = Path(given.runs), Path(given.out)
    per_round = lambda steps: -(-steps // given.rounds)
    models = chosen("models", MODELS)
    plan = Plan(
        sides=chosen("sides", SCRIPTS),
        methods=chosen("methods", METHODS),
        rates=chosen("rates", RATES),
        rounds=given.rounds,
        count=per_round(given.steps),
        at_least=per_round(given.min_steps),
        seconds=given.seconds,
    )
    if not given.report:
        try:
            with contextlib.ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                if given.quick:
                    network = Loopback()
                    plan = plan._replace(rates=["unlimited"], rounds=1, count=4)
                else:
                    network = stack.enter_context(cluster.Network(PROCESSES))
                for model in models:
                    for record in bench(model, plan, network, folder):
                        name = f"{model}-{record['rate']}.json"
                        write(record, runs / "bench_network" / name)
        except KeyboardInterrupt:
            sys.exit("stopped; rates that were finished have their records")
    for path in write_report(runs, out):
        print(path)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "Few steps over loopback; needs no root.")
    flags.DEFINE_bool("report", False, "Only write table and figure.")
    flags.DEFINE_list("models", list(MODELS), "Models.")
    flags.DEFINE_list("rates", list(RATES), "Rates of the links.")
    flags.DEFINE_list("sides", list(SCRIPTS), "Sides.")
    flags.DEFINE_list("methods", list(METHODS), "Rows of the table.")
    flags.DEFINE_integer("steps", 20, "Timed steps of a method.", lower_bound=1)
    flags.DEFINE_integer("min_steps", 4, "Where they are slow.", lower_bound=1)
    flags.DEFINE_integer("rounds", 2, "In how many rounds.", lower_bound=1)
    flags.DEFINE_float("seconds", 20, "A method's time in a round.", lower_bound=0)
    flags.DEFINE_string("runs", "results/runs", "Folder of records.")
    flags.DEFINE_string("out", "results", "Folder of tables/ and figures/.")
    command.run(main)

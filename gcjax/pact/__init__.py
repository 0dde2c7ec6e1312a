"""PACT: how much to compress the model, when, and where to train it.

    problem = gcjax.pact.from_config(config)
    plan = gcjax.pact.plan(problem)

Read `problem.py` first, then `graph.py` and `bucket.py`; `planning.py` says when to use
which solver, `labels.py` how optima are found, `proof.py` how bounds are proved,
`horizon.py` what to do about predictors that err, `joint.py` what is lost if versions
and gradient levels are planned apart.

Plans are carried out by `execution.py`, with what `profiling.py` has measured of the
versions that `compressors.py` makes; these train, and so are imported by themselves:
`from gcjax.pact import execution`.
"""

from gcjax.pact.baselines import BASELINES
from gcjax.pact.horizon import cautious, follow, until_met, widest, with_margin
from gcjax.pact.planning import (
    SOLVERS,
    attempt,
    frontier,
    lower_bound,
    plan,
    plan_batch,
)
from gcjax.pact.predictor import (
    Exponential,
    Jump,
    PowerLaw,
    fit_curve,
    fit_efficiency,
    fit_jump,
    next_loss,
    refit_curve,
)
from gcjax.pact.problem import (
    Cluster,
    GradientLevel,
    Link,
    ModelVersion,
    Node,
    Problem,
    Switch,
    from_config,
)
from gcjax.pact.scenarios import KINDS, perturbed, scenario, with_gradient_levels
from gcjax.pact.schedule import (
    InfeasibleError,
    NoneFoundError,
    Plan,
    Step,
    choices_of,
    feasible,
    replay,
)
from gcjax.pact.tables import Tables, tabulate

__all__ = [
    # the problem
    "Problem",
    "Node",
    "Link",
    "Cluster",
    "ModelVersion",
    "Switch",
    "GradientLevel",
    "from_config",
    "tabulate",
    "Tables",
    # the predictor
    "PowerLaw",
    "Exponential",
    "Jump",
    "next_loss",
    "fit_curve",
    "fit_efficiency",
    "fit_jump",
    "refit_curve",
    # plans
    "plan",
    "plan_batch",
    "attempt",
    "frontier",
    "lower_bound",
    "replay",
    "choices_of",
    "feasible",
    "Plan",
    "Step",
    "InfeasibleError",
    "NoneFoundError",
    "SOLVERS",
    "BASELINES",
    # predictors that may be wrong
    "cautious",
    "widest",
    "with_margin",
    "follow",
    "until_met",
    # synthetic problems
    "scenario",
    "perturbed",
    "with_gradient_levels",
    "KINDS",
]

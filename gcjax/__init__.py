"""gcjax: adaptive gradient compression for data-parallel training in JAX."""

import importlib
from types import ModuleType

from gcjax.aggregate import adapt, aggregator, matrices_above
from gcjax.allocation import (
    Allocation,
    pairs,
    ratios,
    resolved,
    steered,
    switched,
    thresholds,
)
from gcjax.base import Aggregator, Compressor, Exchange, Layout, Selector
from gcjax.compressors.packets import fed_cvlc
from gcjax.compressors.quantize import cast, identity, natural, qsgd, sign, terngrad
from gcjax.compressors.sparsify import random_k, threshold, top_k
from gcjax.exchange import compressed_mean, power_sgd
from gcjax.hlo import wire_report
from gcjax.selectors.layers import lgreco, uniform
from gcjax.server import parameter_server
from gcjax.workers import as_local, over_workers, state_specs

__all__ = [
    # aggregators and what makes them adaptive
    "compressed_mean",
    "power_sgd",
    "parameter_server",
    "aggregator",
    "adapt",
    "matrices_above",
    # compressors
    "identity",
    "cast",
    "top_k",
    "random_k",
    "threshold",
    "qsgd",
    "sign",
    "terngrad",
    "natural",
    "fed_cvlc",
    # selectors
    "uniform",
    "lgreco",
    # how much each worker sends to a parameter server
    "ratios",
    "resolved",
    "thresholds",
    "steered",
    "switched",
    "pairs",
    # mappings over workers
    "over_workers",
    "state_specs",
    "as_local",
    # what is really sent
    "wire_report",
    # planning
    "pact",
    # types
    "Aggregator",
    "Allocation",
    "Compressor",
    "Exchange",
    "Layout",
    "Selector",
]


def __getattr__(name: str) -> ModuleType:
    """Imports `gcjax.pact` when it is first used: scipy's part of it takes a while."""
    if name == "pact":
        return importlib.import_module("gcjax.pact")
    raise AttributeError(f"module 'gcjax' has no attribute {name!r}")

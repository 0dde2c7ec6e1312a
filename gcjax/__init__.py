"""gcjax: adaptive gradient compression for data-parallel training in JAX.

    aggregate = gcjax.adapt(
        gcjax.compressed_mean(gcjax.top_k()), gcjax.lgreco(default=0.01), every=100
    )
    tx = optax.chain(aggregate, optax.sgd(0.1))

An aggregator (`compressed_mean`, `power_sgd`, `parameter_server`) is an optax
transformation: each worker's own gradient goes in, the mean of all workers' comes out.
`adapt` lets a selector (`lgreco`, `uniform`) choose the level of every layer anew while
the model trains. `over_workers` simulates workers on one device, or maps them over a
mesh; `state_specs` and `as_local` are for a `jax.shard_map` of your own.

The README has a whole training loop. `base.py` defines the nouns and follows one
gradient through the code; `help(gcjax.aggregator)` lists the options of every
aggregator. Beside the names below there are `gcjax.selectors.workers`, rules for
workers that hold uneven amounts of data, and `gcjax.network`, what a step costs on
which link.
"""

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

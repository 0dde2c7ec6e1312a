"""What a config says: its call strings, and the parts of a run made from them."""

import ast
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from gcjax import aggregate, allocation, exchange, network, server, splits, tasks
from gcjax.allocation import Allocation
from gcjax.base import Aggregator
from gcjax.compressors import packets, quantize, sparsify
from gcjax.network import rounds
from gcjax.selectors import layers
from gcjax.selectors import workers as rules

AXIS = "workers"
# What the call strings of a config may name.
COMPRESSORS = {
    f.__name__: f
    for f in (
        quantize.identity,
        quantize.cast,
        quantize.qsgd,
        quantize.sign,
        quantize.terngrad,
        quantize.natural,
        packets.fed_cvlc,
        sparsify.top_k,
        sparsify.random_k,
        sparsify.threshold,
    )
}
AGGREGATORS = COMPRESSORS | {
    "compressed_mean": exchange.compressed_mean,
    "power_sgd": exchange.power_sgd,
}
SELECTORS = {
    "uniform": layers.uniform,
    "lgreco": layers.lgreco,
    "layer_seconds": network.layer_seconds,
}
_TASKS = {
    "image_classification": tasks.image_classification,
    "activity_recognition": tasks.activity_recognition,
    "language_model": tasks.language_model,
}
_SPLITS = {
    "skewed": splits.skewed,
    "arithmetic": splits.arithmetic,
    "geometric": splits.geometric,
    "flickr": splits.flickr,
    "by_user": splits.by_user,
}


def call(text: str, names: dict[str, Callable], field: str, **extra: Any) -> Any:
    """Evaluates a call string of a config, such as "compressed_mean(top_k(0.01))".

    Only calls of the given names with literal arguments, and such calls as arguments.

    Raises:
      ValueError: if the text is anything else, or the call refuses its arguments.
    """

    def value(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        if not isinstance(node.func, ast.Name) or node.func.id not in names:
            raise ValueError(f"unknown name {ast.unparse(node.func)}")
        args = [value(a) for a in node.args]
        return names[node.func.id](
            *args, **{k.arg: value(k.value) for k in node.keywords}
        )

    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.Call):
            raise ValueError("not a call")
        tree.keywords += [ast.keyword(k, ast.Constant(v)) for k, v in extra.items()]
        return value(tree)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.{field} = {text!r}: {error}; it must be a call of one of "
            f"{', '.join(names)}"
        ) from None


def ratio_rules(p: np.ndarray) -> dict[str, Callable[..., jax.Array]]:
    """Rules for fixed ratios [n], bound to the weights p [n]; see `allocations`.

    `bcrs(0.001, "with")` gives the faster links of `network.rounds.uneven` to the
    workers of larger weight, "against" to those of smaller, "across" to any, and so
    does `deadline(0.01, "with", 377e3, fit=(1000, 100), other_seconds=0.1)`.
    """
    return {
        "ratios": lambda *values: np.asarray(values),
        "uniform": lambda ratio: rules.power_rule(p, ratio, 0.0),
        "dagc_r": functools.partial(rules.dagc_r, p),
        "power_rule": functools.partial(rules.power_rule, p),
        "bcrs": functools.partial(_bcrs, p),
        "deadline": functools.partial(_deadline, p),
    }


def _bcrs(p: np.ndarray, ratio: float, order: str, bits: float) -> jax.Array:
    return rules.bcrs(*_links(p, order), bits, ratio)


def _deadline(p, ratio: float, order: str, bits: float, **options: Any) -> jax.Array:
    return rules.deadline(p, ratio, (*_links(p, order), bits), **options).ratios


def _links(p: np.ndarray, order: str) -> tuple[np.ndarray, np.ndarray]:
    """Bandwidths, less what headers take, and latencies."""
    links = rounds.uneven(p, order)
    return links.upload_bits_per_s / links.overhead, links.latency_s


def allocations(p: np.ndarray) -> dict[str, Callable[..., Allocation]]:
    """What methods of a parameter server may name: rules bound to the weights p [n].

    Ratios: `ratios(0.01, 0.001)`, one per worker, `uniform(0.01)`, `dagc_r(0.01,
    criterion="psi")`, `power_rule(0.01, 2)`; the largest of all entries, or with
    `per_layer=True` of each layer; `bcrs(0.001, "against", 377e3)`, of workers that
    would upload as many bits of all entries; see `ratio_rules`. Thresholds:
    `hard(0.05)`, `dagc_a(0.05)`. `steered`, `resolved(0.01, criterion="psi")`,
    `accordion(0.001, 0.01)` and `pairs(lgreco(default=0.01))`.
    """
    count = len(p)

    def fixed(rule: Callable) -> Callable:
        return lambda *args, per_layer=False, **options: allocation.ratios(
            rule(*args, **options), per_layer=per_layer
        )

    def resolved(ratio: float, every: int = 50, **options: Any) -> Allocation:
        rule = lambda zeta: rules.dagc_r(jnp.asarray(p), ratio, zeta=zeta, **options)
        return allocation.resolved(rule, count, every=every)

    def accordion(*args: Any, relative: bool = True, **options: Any) -> Allocation:
        rule = rules.accordion(*args, **options)
        return allocation.switched(rule, count, relative=relative)

    return {
        **{name: fixed(rule) for name, rule in ratio_rules(p).items()},
        "hard": lambda value: allocation.thresholds(np.where(p > 0, value, np.inf)),
        "dagc_a": lambda value: allocation.thresholds(rules.dagc_a(p, value)),
        "steered": functools.partial(allocation.steered, p),
        "resolved": resolved,
        "accordion": accordion,
        "pairs": lambda selector, **o: allocation.pairs(selector, p, **o),
        "lgreco": layers.lgreco,
    }


def weights(config: ml_collections.ConfigDict, task: tasks.Task) -> np.ndarray:
    """Each worker's share of the training samples, [n]; equal ones without a split."""
    n = config.num_workers
    if task.shards is None:
        return np.full(n, 1 / n)
    return splits.weights(task.shards(config.seed, n))


def build_aggregator(
    config: ml_collections.ConfigDict, method: str, p: np.ndarray
) -> Aggregator:
    """The aggregator of one method of a config; p are its workers' weights."""
    if config.aggregator.startswith("parameter_server("):
        granted = allocation.ratios(np.ones(len(p)))
        if method != "dense":
            granted = call(method, allocations(p), "methods")
        make = functools.partial(server.parameter_server, granted, p, AXIS)
        blend = functools.partial(rules.bcrs_coefficients, p)
        names = COMPRESSORS | ratio_rules(p) | {"bcrs_coefficients": blend}
        names["parameter_server"] = make
        return call(config.aggregator, names, "aggregator", seed=config.seed)
    if method == "dense":
        return exchange.compressed_mean(quantize.identity(), AXIS, seed=config.seed)
    made = call(config.aggregator, AGGREGATORS, "aggregator", seed=config.seed)
    selector = call(method, SELECTORS, "methods")
    return aggregate.adapt(made, selector, config.every, config.warmup_steps)


def build_task(config: ml_collections.ConfigDict) -> tasks.Task:
    """The task of a config, with its data loaded."""
    split = call(config.split, _SPLITS, "split") if config.split else None
    given = dict(data_dir=config.data_dir or None, split=split)
    names = {name: functools.partial(make, **given) for name, make in _TASKS.items()}
    return call(config.task, names, "task")


def build_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """What comes after aggregation: clipping, weight decay, the optimizer."""
    if config.optimizer not in ("sgd", "adamw"):
        raise ValueError(
            f"config.optimizer must be 'sgd' or 'adamw', got {config.optimizer!r}"
        )
    if config.lr_schedule not in ("constant", "cosine"):
        raise ValueError(
            "config.lr_schedule must be 'constant' or 'cosine', got "
            f"{config.lr_schedule!r}"
        )
    peak, warmup = config.learning_rate, config.lr_warmup_steps
    rest = max(1, config.steps - warmup)
    after = (
        optax.cosine_decay_schedule(peak, rest)
        if config.lr_schedule == "cosine"
        else optax.constant_schedule(peak)
    )
    rate = after
    if warmup:
        up = optax.linear_schedule(0.0, peak, warmup)
        rate = optax.join_schedules([up, after], [warmup])
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.optimizer == "adamw":
        return optax.chain(*clip, optax.adamw(rate, weight_decay=config.weight_decay))
    decay = [optax.add_decayed_weights(config.weight_decay)] * bool(config.weight_decay)
    return optax.chain(*clip, *decay, optax.sgd(rate, momentum=config.momentum))

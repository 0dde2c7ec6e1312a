"""Selectors that give every layer its level."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax.base import Problem, Selector, pick
from gcjax.selectors import knapsack


def uniform(default: Any) -> Selector:
    """The same level for every layer, for the whole run.

    Args:
      default: A value of the ladder: a density, bits, or a rank.

    References: none; the baseline of all others.
    """
    return Selector(
        default=default,
        levels=None,
        snapshot_steps=0,
        corrected=True,
        worker=None,
        shrinks=True,
        init=lambda num_layers: (),
        dense=False,
        update=lambda problem, state: (problem.default, state),
    )


def lgreco(
    default: Any,
    levels: Sequence[Any] | None = None,
    alpha: float = 1.0,
    error: str = "norm",
    solver: str = "lagrangian",
    snapshot_steps: int = 10,
    sample: str = "corrected",
    worker: int | None = None,
    cost: Callable | None = None,
) -> Selector:
    """L-GreCo: the fewest bits whose total error is no larger than uniform's.

    Minimises sum_l words[l, v_l] subject to sum_l e[l, v_l] <= alpha * sum_l
    e[l, default], where e is measured on a snapshot: the sum, over the last steps
    before a selection, of what entered a worker's compressor. What rounding up to a
    capacity leaves over goes to the layers that gain most from it.

    Args:
      default: A value of the ladder, the uniform level that a user would have chosen.
        It sets the error budget, is used until the first selection and for layers
        whose table is useless, and is never done worse than.
      levels: Values of the ladder to choose from; None for all. The paper's ranges are
        half to twice the default rank or bits.
      alpha: Error budget in units of the default's error, positive.
      error: "norm" adds Frobenius norms, as the authors do; "squared" adds their
        squares, as mean squared error and the theory of error feedback do.
      solver: "lagrangian" or "dp" (the paper's), see `gcjax.selectors.knapsack`.
      snapshot_steps: Steps in a snapshot.
      sample: What a snapshot sums: "corrected", the gradient with the error of error
        feedback, as the authors do; or "gradient", without. The error of a layer that
        was squeezed has grown, and it counts in every step of the sum, so "corrected"
        relaxes that layer at the next selection and squeezes another: with steep
        ladders levels then alternate from selection to selection.
      worker: Whose snapshot decides; None for the mean of all workers' squared errors.
      cost: What is minimised instead of words: seconds on a network, from
        `gcjax.network.layer_seconds`. A layer may then also travel uncompressed; all
        do where compression costs more time than it saves.

    Raises:
      ValueError: for an unknown error or solver, or alpha or snapshot_steps not
        positive.
    References: Markov et al., 2024, L-GreCo: Layerwise-Adaptive Gradient Compression
      for Efficient Data-parallel Deep Learning, arXiv:2210.17357, Algorithm 1.
    Note: Deviations from the authors' released code, and how to have its behaviour:
      all workers' tables count (`worker=0`); the solver is a Lagrangian sweep, closer
      to the optimum than the discretised programme (`solver="dp"`; the one bin of
      10,000 that theirs loses is `alpha=0.9999`); low-rank errors come from
      eigenvalues, not from five power iterations; warm-started factors are kept when a
      rank changes, not drawn anew; sizes are exact words, indices and scales included;
      uniform is an explicit fall-back.
    """
    if error not in ("norm", "squared"):
        raise ValueError(f"lgreco: error must be 'norm' or 'squared', got {error!r}")
    if solver not in ("lagrangian", "dp"):
        raise ValueError(f"lgreco: solver must be 'lagrangian' or 'dp', got {solver!r}")
    if sample not in ("corrected", "gradient"):
        raise ValueError(
            f"lgreco: sample must be 'corrected' or 'gradient', got {sample!r}"
        )
    if not alpha > 0:
        raise ValueError(f"lgreco: alpha must be positive, got {alpha}")
    if snapshot_steps < 1:
        raise ValueError(f"lgreco: snapshot_steps must be >= 1, got {snapshot_steps}")

    def update(problem: Problem, state):
        errors, words, default, capacities, kinds, sizes = problem
        errors = jnp.sqrt(errors) if error == "norm" else errors
        dense = np.array([kind == "dense" for kind in kinds] or [False])
        dense = np.broadcast_to(dense, words.shape[1])
        costs = words if cost is None else cost(words, sizes, kinds)
        costs = jnp.asarray(costs, jnp.float32)
        budget = alpha * jnp.sum(pick(errors, default))
        # A tighter budget than uniform's rules uniform out as the fall-back.
        fall_back = default if alpha >= 1 else None
        chosen = knapsack.minimise_size(
            errors, costs, budget, default=fall_back, method=solver
        )
        usable, levels = jnp.all(chosen >= 0), jnp.maximum(chosen, 0)
        in_message = np.where(dense, 0, words)
        if len(capacities) == 1:  # one collective: what its length leaves is known
            levels = _spend(errors, in_message, capacities[0], levels, ~dense)
        if cost is not None:
            # A step also pays for padding and latency, which no layer's entry shows.
            others = [fall_back] * (alpha >= 1)
            others += [jnp.full_like(levels, np.argmax(dense))] * bool(dense.any())
            per_word = cost(np.ones((1, 1)), np.zeros(1), kinds[:1]).item()
            once = len(capacities) * cost.once(kinds[0])
            levels = _fastest(
                [levels, *others], costs, in_message, capacities, per_word, once
            )
        return jnp.where(usable, levels, chosen), state

    return Selector(
        default=default,
        levels=None if levels is None else tuple(levels),
        snapshot_steps=snapshot_steps,
        corrected=sample == "corrected",
        worker=worker,
        shrinks=alpha >= 1,
        dense=cost is not None,
        init=lambda num_layers: (),
        update=update,
    )


def _spend(errors, words, ladder: list[int], levels, within: np.ndarray):
    """Fills a message's capacity: again and again the change of most gain.

    Only changes to levels `within` bool[V]; a layer that travels elsewhere, without
    words here and without error, stays there.
    """
    words = jnp.asarray(words, jnp.int32)
    layers = jnp.arange(levels.size)
    capacity = _capacity(ladder, jnp.sum(pick(words, levels)))

    def gains(levels):
        slack = capacity - jnp.sum(pick(words, levels))
        fits = words - pick(words, levels)[:, None] <= slack
        fits &= within
        gain = jnp.where(fits, pick(errors, levels)[:, None] - errors, 0)
        return jnp.max(gain, axis=1), jnp.argmax(gain, axis=1).astype(levels.dtype)

    def change(levels):
        gain, better = gains(levels)
        return jnp.where(layers == jnp.argmax(gain), better, levels)

    # Every change lowers the total error, so this ends.
    return lax.while_loop(lambda v: jnp.max(gains(v)[0]) > 0, change, levels)


def _fastest(candidates, costs, words, capacities, per_word: float, once: float):
    """Those levels whose step takes least seconds, padding and latency included.

    Equally fast ones: the first.
    """
    words = jnp.asarray(words, jnp.int32)

    def total(levels):
        used, more = jnp.sum(pick(words, levels)), jnp.float32(once)
        if len(capacities) == 1:
            padding = (_capacity(capacities[0], used) - used).astype(jnp.float32)
            # A message that is longer than all capacities cannot be sent.
            more += jnp.where(padding < 0, jnp.inf, per_word * padding)
        return jnp.sum(pick(costs, levels)) + jnp.where(used > 0, more, 0)

    totals = jnp.stack([total(levels) for levels in candidates])
    totals = totals.at[0].multiply(1 - 1e-6)  # rounding must not decide for others
    return jnp.stack(candidates)[jnp.argmin(totals)]


def _capacity(ladder: list[int], used):
    """The least capacity that suffices, the largest if none does."""
    lengths = jnp.asarray(ladder, jnp.int32)
    at = jnp.searchsorted(lengths, used)
    return lengths[jnp.minimum(at, lengths.size - 1)]

"""A lower bound on the energy of all plans, proved from an estimate of what is needed.

The deadline and `max_epochs` get multipliers (Lagrangian relaxation), which leaves a
shortest path from the start to the target, over progress as a continuous coordinate.
Rounding progress up to a grid at every epoch is one way to bound that path from below,
but a plan of K epochs loses up to K grid steps by it. Here the grid carries a potential
instead, phi(version, cluster, progress), linear between points: the *estimated* cost of
what is still needed. Whatever phi is, the true cost is

    V(x) >= phi(x) + W(cell of x),

    W(cell) = min over actions and x in the cell of
              cost + phi(x + step) - phi(x) + W(cell of x + step),

and as phi is nearly right, what W adds up is small. The inner minimum is exact: the
difference is linear between the points where x or x + step meet the grid. So the bound
is as good as the estimate, and is proved at the same time.

References:
  Handler and Zang, "A dual algorithm for the constrained shortest path problem",
  Networks 10, 1980, for the multipliers. Potentials that are corrected to what they can
  prove are those of label correcting with reduced costs; the form above is ours.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gcjax.pact.graph import SLACK, TICKS, Bounds, Graph, start_ticks

_PIECES = 4  # of a cell, in each of which a switch is bounded


def least_joules(graph: Graph, bound: Bounds) -> float:
    """Energy in joules that no plan can stay below.

    Args:
      graph: What is searched.
      bound: From `estimate`; its values at the best multipliers are the potential.

    Returns:
      The proved bound, at least 0; inf where it is proved that no plan exists.
    """
    if bound.proof:
        return np.inf
    value = np.asarray(bound.value)
    bins = value.shape[2] - 1
    m, c = graph.tables.start
    start = start_ticks(graph) * bins / TICKS
    i = int(start)
    # The price of all that is allowed of time and epochs.
    paid = bound.weights[:, 1:].astype(float) @ [1, graph.problem.max_epochs]
    lower = np.where(bound.weights[:, 0] > 0, value[m, c, i] - paid, -np.inf)
    best = int(np.argmax(lower))
    phi = _potential(value[None, ..., best])
    weights = np.asarray(bound.weights[best : best + 1], float)
    correction, _ = _correct(graph, bound.energy_unit_j, weights, phi)
    phi = phi[0, m, c]
    here = phi[i] + (start - i) * (phi[min(i + 1, bins)] - phi[i])
    here += float(correction[0, m, c, i])
    return max(0.0, float(here * (1 - SLACK) - paid[best]) * bound.energy_unit_j)


def proved(graph: Graph, bound: Bounds) -> Bounds:
    """The bounds of `estimate`, with values that are proved.

    A value at a point of progress holds from the point before on.
    """
    phi = _potential(np.moveaxis(np.asarray(bound.value), -1, 0))
    weights = np.asarray(bound.weights, float)
    corrections = _correct(graph, bound.energy_unit_j, weights, phi)
    found = []
    for correction in corrections:
        w = np.array(correction)
        w[..., 1:] = np.minimum(w[..., 1:], w[..., :-1])
        found.append(np.maximum(np.moveaxis(phi + w, 0, -1), 0))
    value, stay = (np.asarray(x, np.float32) for x in found)
    at = int(-(-start_ticks(graph) * (value.shape[2] - 1) // TICKS))
    root = value[(*graph.tables.start, at)].astype(float) * (1 - SLACK)
    proof = bound.proof
    if root[1] > 1:
        proof = "the deadline is too short even for the fastest epochs"
    elif root[2] > graph.problem.max_epochs:
        proof = "max_epochs is too few even for the most useful epochs"
    paid = bound.weights[:, 1:].astype(float) @ [1, graph.problem.max_epochs]
    priced = bound.weights[:, 0] > 0
    root_j = max(0.0, (root - paid)[priced].max()) * bound.energy_unit_j
    return bound._replace(value=value, stay=stay, root_j=root_j, proof=proof)


def _potential(value: np.ndarray) -> np.ndarray:
    """Finite and falling with progress, [W, M, C, J + 1]; any potential is legal."""
    phi = value.astype(float)
    for j in range(1, phi.shape[3]):
        phi[..., j] = np.where(np.isfinite(phi[..., j]), phi[..., j], phi[..., j - 1])
    phi = np.maximum.accumulate(np.where(np.isfinite(phi), phi, 0)[..., ::-1], -1)
    return phi[..., ::-1]


def _correct(graph: Graph, unit_j: float, weights, phi) -> tuple:
    """Corrections of the potentials of weights [W, 3]; see `_corrections`."""
    tables, bins = graph.tables, phi.shape[3] - 1
    scale = (weights / [unit_j, graph.problem.deadline_s, 1.0]).T[..., None, None, None]
    possible = np.isfinite(graph.energy_j)
    joules = np.where(possible, graph.energy_j, 0)
    seconds = np.where(possible, graph.seconds, 0)
    cost = scale[0] * joules + scale[1] * seconds + scale[2]
    range_ = (graph.high - graph.low)[:, None, None]
    step = np.minimum(graph.progress / range_ * bins * (1 + 1e-12), bins)
    exists = np.isfinite(tables.switch_j) & graph.allowed()[..., None]
    switch = scale[0] * np.where(exists, tables.switch_j, 0)
    switch += scale[1] * np.where(exists, tables.switch_s, 0)
    knots = bins * _PIECES
    least = -(-graph.switch_ticks(knots, up=False) * bins // TICKS) - 1
    most = graph.switch_ticks(knots, up=True) / TICKS * bins
    to_f32 = partial(np.asarray, dtype=np.float32)
    whole = np.floor(step).astype(np.int32)
    return jax.device_get(
        _corrections(
            to_f32(phi),
            graph.goal,
            to_f32(np.where(possible, cost, np.inf)),
            whole,
            to_f32(step - whole),
            graph.destination,
            to_f32(np.where(exists, switch, np.inf)),
            np.maximum(least, 0).astype(np.int32),
            to_f32(most),
        )
    )


@jax.jit
def _corrections(phi, goal, cost, whole, part, destination, switch, least, most):
    """Corrections of all cells, [j, j + 1) each and the last of one point.

    Args:
      phi: float32[W, M, C, J + 1]
      goal: bool[M]
      cost: float32[W, M, C, P], inf where impossible
      whole: int32[M, C, P], whole cells of a step
      part: float32[M, C, P], the rest of the step, in [0, 1)
      destination: int32[M, C, P]
      switch: float32[W, M, M, C], inf where impossible
      least: int32[M, M, Q + 1], cell at or before what a switch leads to
      most: float32[M, M, Q + 1], point at or after it

    Returns:
      [W, M, C, J + 1] each: where any version may come next, and where the next epoch
      trains version M.
    """
    same = goal, whole, part, destination, least, most
    return lax.map(lambda x: _corrected(*x, *same), (phi, cost, switch))


def _corrected(phi, cost, switch, goal, whole, part, destination, least, most):
    """The same for one weight."""
    size, clusters, bins = phi.shape[0], phi.shape[1], phi.shape[2] - 1
    pieces = (least.shape[2] - 1) // bins
    # Progress past the target is progress at the target.
    padded = jnp.concatenate([phi, phi[..., -1:], phi[..., -1:]], -1)
    knots = jnp.arange(bins * pieces + 1, dtype=jnp.float32) / pieces

    def between(table, at):  # table [..., J + 3], linear between points
        share = at - jnp.floor(at)
        low = jnp.floor(at).astype(jnp.int32)
        return (1 - share) * table[..., low] + share * table[..., low + 1]

    def version(back, tables):
        found, staying = tables
        m = size - 1 - back
        after = jax.vmap(between)(padded, most[m])  # [M, C, Q + 1]
        # Anything from the least progress on.
        later = lax.cummin(staying, axis=2, reverse=True)
        later = jax.vmap(lambda t, at: t[:, at])(later, least[m])
        before = between(padded[m], knots)
        first = after[..., 1:] - before[:, :-1] + later[..., :-1]
        last = after[..., -1] - before[:, -1] + later[..., -1]
        others = (jnp.arange(size) > m)[:, None]
        costs = jnp.where(others, switch[m], jnp.inf)
        moved = jnp.min(first + costs[..., None], 0)
        moved = jnp.min(moved.reshape(clusters, bins, pieces), -1)
        end = jnp.min(last + costs, 0)
        # Where nothing is gained any more, all clusters are one epoch away.
        end = jnp.where(goal[m], -phi[m, :, bins], jnp.min(end + phi[m, :, bins]))
        end = jnp.where(goal[m], end, end - phi[m, :, bins])
        moved = jnp.concatenate([moved, end[:, None]], 1)
        own_phi, short = padded[m], whole[m] < 1

        def cell(i, tables):
            own, stay = tables  # [J + 1, C] each
            j = bins - i
            here, following = own_phi[:, j][:, None], own_phi[:, j + 1][:, None]
            to = destination[m]

            def least(whole, r):  # of an action: its cost, and what phi loses by it
                near = jnp.minimum(j + whole, bins)
                there = [own_phi[to, jnp.minimum(near + k, bins)] for k in range(3)]
                change = jnp.minimum(
                    (1 - r) * there[0] + r * there[1] - here,
                    there[1] - r * here - (1 - r) * following,
                )
                change = jnp.minimum(
                    change, (1 - r) * there[1] + r * there[2] - following
                )
                rest = jnp.minimum(own[near, to], own[jnp.minimum(near + 1, bins), to])
                return cost[m] + change, rest

            # More progress never hurts: a step within the cell may count as one.
            paid, rest = least(jnp.maximum(whole[m], 1), jnp.where(short, 0, part[m]))
            each = paid + rest
            best = jnp.min(jnp.where(short, jnp.inf, each), 1)
            # But then many of them are taken before something else follows, anywhere:
            # so many that phi falls by more than they cost is at most 1 / step + 1.
            paid, _ = least(whole[m], part[m])
            many = jnp.where(short, 1 / jnp.maximum(part[m], 1e-9) + 1, 0)
            lost = jnp.max(jnp.where(paid < 0, -paid * many, 0))
            after = jnp.minimum(best, jnp.minimum(moved[:, j], own[j + 1]))
            each = jnp.maximum(each, jnp.maximum(paid, 0) + jnp.min(after) - lost)
            best = jnp.minimum(best, jnp.min(jnp.where(short, each, jnp.inf), 1))
            value = jnp.where(i == 0, moved[:, bins], jnp.minimum(best, moved[:, j]))
            return own.at[j].set(value), stay.at[j].set(best)

        own = jnp.full((bins + 1, clusters), jnp.inf).at[bins].set(moved[:, bins])
        own, stay = lax.fori_loop(0, bins + 1, cell, (own, own))
        return found.at[m].set(own.T), staying.at[m].set(stay.T)

    empty = jnp.full(phi.shape, jnp.inf, jnp.float32)
    return lax.fori_loop(0, size, version, (empty, empty))

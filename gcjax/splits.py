"""Which training samples each worker holds: uneven sizes, skewed labels, real users.

A split is a function (`Samples`, number of workers, seed) -> shards, one array of
sample numbers per worker, disjoint and the same for the same seed. Tasks take one as
their option `split`; `weights` of its shards are the p of `gcjax.selectors.workers`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gcjax.selectors.workers import largest_remainder

Shards = list[np.ndarray]  # of int64, ascending; one array per worker

# Samples per worker (rows) and label of the Flickr-Mammal data set by subcontinent,
# the real split of Lu et al., 2023, arXiv:2311.07324, figure 3a.
FLICKR = np.array(
    [
        [21099, 11534, 4045, 9174, 5182, 2322, 7203, 7499, 6351, 5549],
        [8022, 4643, 2155, 12015, 13470, 3388, 2500, 5625, 1953, 3555],
        [150, 123, 12268, 60, 67, 2822, 25, 96, 341, 7725],
        [611, 2769, 1636, 1921, 3219, 2107, 3435, 3167, 852, 1796],
        [213, 3185, 595, 1022, 293, 2861, 9023, 857, 666, 583],
        [225, 3237, 301, 361, 1340, 833, 379, 543, 5903, 135],
        [85, 795, 2575, 179, 62, 4493, 516, 1221, 230, 142],
        [162, 1651, 88, 166, 347, 4040, 44, 156, 1825, 29],
        [170, 227, 2619, 756, 160, 2250, 39, 1321, 187, 29],
        [4, 598, 399, 124, 1056, 263, 621, 730, 1440, 552],
        [934, 1784, 198, 261, 353, 140, 102, 331, 189, 102],
        [29, 724, 17, 32, 217, 52, 3, 36, 249, 39],
        [0, 176, 7, 5, 67, 107, 3, 14, 167, 13],
        [15, 20, 1, 2, 22, 2, 0, 2, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 15, 0],
    ]
)


class Samples(NamedTuple):
    """What a split looks at."""

    labels: np.ndarray  # int[n], 0 to L - 1
    users: np.ndarray | None = None  # int[n], who made the sample, where that is known


Split = Callable[[Samples, int, int], Shards]


# --- Shares of the data. --------------------------------------------------------------


def arithmetic(skew: float) -> Callable[[int], np.ndarray]:
    """Shares in an arithmetic series, largest first: (number of workers) -> [n], sum 1.

    Args:
      skew: Ratio of the largest share to the smallest, at least 1.

    Raises:
      ValueError: if skew is below 1.
    References: Lu et al., 2023, arXiv:2311.07324, section 5 (there blurred by a
      Dirichlet draw that the text does not fix).
    """
    _check_skew(skew)
    return lambda n: _normalised(np.linspace(skew, 1, n) if n > 1 else np.ones(1))


def geometric(skew: float, repeat_last: bool = False) -> Callable[[int], np.ndarray]:
    """Shares in a geometric series, largest first: (number of workers) -> [n], sum 1.

    Args:
      skew: Ratio of the largest share to the smallest, at least 1.
      repeat_last: The smallest share comes twice, as in the code of DAGC's authors.

    Raises:
      ValueError: if skew is below 1.
    """
    _check_skew(skew)

    def shares(n: int) -> np.ndarray:
        twice = repeat_last and n > 2
        series = np.geomspace(skew, 1, n - twice) if n > 1 else np.ones(1)
        return _normalised(np.append(series, [1.0] * twice))

    return shares


def _check_skew(skew: float) -> None:
    if not 1 <= skew < np.inf:
        raise ValueError(
            f"skew, the largest share over the smallest, must be >= 1, got {skew}"
        )


def _normalised(shares: np.ndarray) -> np.ndarray:
    return shares / shares.sum()


# --- Splits. --------------------------------------------------------------------------


def skewed(
    shares: Callable[[int], np.ndarray] | Sequence[float] | None = None,
    concentration: float | None = None,
) -> Split:
    """Splits all samples by shares, with class mixes drawn from a Dirichlet law.

    Every worker draws a mix of classes. Scaled to the shares and to what there is of
    every class, by turns, the mixes become a table of counts whose sums are exact both
    ways; with uneven shares that pulls the largest workers towards the overall mix.

    Args:
      shares: `arithmetic(skew)`, `geometric(skew)`, or a positive number per worker;
        None for equal ones. Sizes are rounded by largest remainders, at least 1.
      concentration: Of the symmetric Dirichlet law, positive: 0.5 is strongly skewed,
        100 nearly even. None: labels play no part.

    Raises:
      ValueError: if concentration or shares are out of range; by the split, for more
        workers than samples, or another number of workers than shares.
    References: Hsu, Qi and Brown, 2019, Measuring the Effects of Non-Identical Data
      Distribution for Federated Visual Classification, arXiv:1909.06335 (Dirichlet);
      Sinkhorn and Knopp, 1967 (scaling by turns).
    """
    if concentration is not None and not concentration > 0:
        raise ValueError(f"concentration must be positive, got {concentration}")
    if shares is not None and not callable(shares):
        fixed = np.asarray(shares, np.float64)
        if fixed.ndim != 1 or not (np.isfinite(fixed) & (fixed > 0)).all():
            raise ValueError(f"shares must be one positive number each, got {shares}")
        shares = lambda n: _normalised(fixed)

    def split(samples: Samples, num_workers: int, seed: int) -> Shards:
        wanted = np.full(num_workers, 1 / num_workers)
        if shares is not None:
            wanted = shares(num_workers)
        if len(wanted) != num_workers:
            raise ValueError(
                f"the split has {len(wanted)} shares, for {num_workers} workers"
            )
        sizes = _sizes(wanted, len(samples.labels))
        rng = np.random.default_rng((seed, 2))
        if concentration is None:
            order = rng.permutation(len(samples.labels))
            return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]
        counts = np.bincount(samples.labels)
        mixes = rng.dirichlet(np.full(len(counts), concentration), num_workers)
        return _deal(samples.labels, _table(mixes, sizes, counts), rng)

    return split


def flickr(scale: float = 0.157) -> Split:
    """The label profile of the 15 Flickr workers on another data set of 10 classes.

    Every worker gets its Flickr count times `scale`, at least one sample, divided among
    the classes in the same proportions; the other samples are not used.

    Args:
      scale: Positive. 0.157 is the most that CIFAR-10 allows, in three digits.

    Raises:
      ValueError: if scale is not positive; by the split, for other numbers of workers
        or classes, or where a class has not enough samples.
    References: Lu et al., 2023, arXiv:2311.07324, figure 3a.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")

    def split(samples: Samples, num_workers: int, seed: int) -> Shards:
        counts = np.bincount(samples.labels)
        if (num_workers, len(counts)) != FLICKR.shape:
            raise ValueError(
                "the Flickr profile has 15 workers and 10 labels, not "
                f"{num_workers} and {len(counts)}"
            )
        rows = []
        for row in FLICKR:
            size = max(1, round(scale * row.sum()))
            rows.append(np.asarray(largest_remainder(row / row.sum(), size), np.int64))
        table = np.array(rows)
        if (table.sum(0) > counts).any():
            label = int(np.argmax(table.sum(0) - counts))
            raise ValueError(
                f"scale = {scale} needs {table[:, label].sum()} samples of label "
                f"{label}, but there are {counts[label]}; lower it"
            )
        return _deal(samples.labels, table, np.random.default_rng((seed, 2)))

    return split


def by_user() -> Split:
    """One real user per worker: those with most samples, largest first.

    Samples of all others are not used. The seed plays no part.

    Raises:
      ValueError: by the split, where users are not known or fewer than workers.
    """

    def split(samples: Samples, num_workers: int, seed: int) -> Shards:
        del seed
        if samples.users is None:
            raise ValueError(
                "by_user() needs to know who made a sample: use shakespeare_roles or "
                "wisdm, or another split"
            )
        users, counts = np.unique(samples.users, return_counts=True)
        if num_workers > len(users):
            raise ValueError(
                f"num_workers must be in [1, {len(users)}], the number of users, got "
                f"{num_workers}"
            )
        largest = users[np.argsort(-counts, kind="stable")[:num_workers]]
        return [np.flatnonzero(samples.users == user) for user in largest]

    return split


def _sizes(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of the given total, at least 1 each, int64[n]."""
    if len(shares) > total:
        raise ValueError(f"{len(shares)} workers cannot share {total} samples")
    sizes = np.asarray(largest_remainder(shares, total), np.int64).copy()
    while (missing := np.flatnonzero(sizes == 0)).size:
        sizes[missing[0]] += 1
        sizes[np.argmax(sizes)] -= 1
    return sizes


def _table(mixes: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whole numbers int64[n, L] near a mix per row, with exact sums both ways."""
    table = np.maximum(mixes, 1e-9) * sizes[:, None]  # a class must not be ruled out
    for _ in range(500):
        table *= counts / np.maximum(table.sum(0), 1e-300)
        table *= (sizes / table.sum(1))[:, None]
    table *= np.minimum(1, counts / np.maximum(table.sum(0), 1e-300))
    whole = np.floor(table).astype(np.int64)
    # What rounding took away, row by row: first where the fraction is largest.
    rest = counts - whole.sum(0)
    for i, missing in enumerate(sizes - whole.sum(1)):
        for label in np.argsort(whole[i] - table[i], kind="stable"):
            given = min(missing, rest[label], 1)
            whole[i, label] += given
            rest[label] -= given
            missing -= given
        for label in np.argsort(-rest, kind="stable"):  # classes that others had filled
            given = min(missing, rest[label])
            whole[i, label] += given
            rest[label] -= given
            missing -= given
    return whole


def _deal(labels: np.ndarray, table: np.ndarray, rng: np.random.Generator) -> Shards:
    """Draws table[i, label] samples for every worker i, without replacement."""
    parts = [[] for _ in table]
    for label, column in enumerate(table.T):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(column)
        for part, end, count in zip(parts, ends, column, strict=True):
            part.append(members[end - count : end])
    return [np.sort(np.concatenate(part)) for part in parts]


# --- What a split looks like. ---------------------------------------------------------


def weights(shards: Shards) -> np.ndarray:
    """Share of the samples in each shard, float64[n], sum 1."""
    return _normalised(np.array([len(shard) for shard in shards], np.float64))


def profile(shards: Shards, labels: np.ndarray) -> np.ndarray:
    """Samples of each worker and label, int64[n, L]."""
    classes = int(labels.max()) + 1
    return np.array([np.bincount(labels[s], minlength=classes) for s in shards])


def figure(counts: np.ndarray, title: str = "") -> Any:
    """Draws workers x labels, the area of a disc for the number of samples.

    Args:
      counts: int[n, L], from `profile`.
      title: Above it.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure  # here, as training does without

    n, classes = counts.shape
    size = (min(1.5 + 0.35 * classes, 12), min(1.2 + 0.3 * n, 12))
    drawing = Figure(figsize=size, layout="constrained")
    axes = drawing.add_subplot()
    worker, label = np.nonzero(counts)
    area = counts[worker, label] / counts.max()
    axes.scatter(label, worker, s=150 * area)
    axes.set(xlabel="label", ylabel="worker", title=title)
    axes.set(xlim=(-0.8, classes - 0.2), ylim=(n - 0.2, -0.8))
    totals = axes.secondary_yaxis("right")
    totals.set_ylabel("samples")
    shown = np.unique(np.linspace(0, n - 1, min(n, 40)).round().astype(int))
    totals.set_yticks(shown, [f"{c:,}" for c in counts.sum(1)[shown]])
    return drawing

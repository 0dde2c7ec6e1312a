"""Shares of the data over workers, and the criteria of ratios in float64."""

import numpy as np

from gcjax.selectors.workers import CRITERIA

EXACT = CRITERIA[1:]  # "paper" is no minimum


def arithmetic(n, skew):
    p = np.linspace(skew, 1, n)
    return p / p.sum()


def released_geometric(n, skew):
    """The series in the authors' code: the last of n - 1 values comes twice."""
    p = np.append(np.logspace(np.log10(skew), 0, n - 1), 1)
    return p / p.sum()


FLICKR = np.array(
    [79958, 57326, 23677, 21513, 19298, 13257, 10298, 8508, 7758, 5787, 4394, 1398]
    + [559, 64, 16]
)
ONE_HALF = np.array([0.5, *[0.05] * 10])


def random_p(seed, n, zeros=0):
    rng = np.random.default_rng(seed)
    p = rng.lognormal(0, rng.uniform(0, 3), n)
    p[rng.permutation(n)[:zeros]] = 0
    return p / p.sum()


def plain_phi(p, d):
    return np.sum(p / np.sqrt(d)) / np.sqrt(d.min())


def plain_psi(p, d):
    return np.sqrt(len(p) * np.sum((p / d) ** 2))


def plain_omega(p, d):
    return np.sum(p / d)


PLAIN = {"phi_exact": plain_phi, "psi": plain_psi, "omega": plain_omega}

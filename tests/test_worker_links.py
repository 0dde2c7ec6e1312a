"""Ratios that follow workers' links: BCRS, and deadlines of rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worker_cases import EXACT, PLAIN

from gcjax.selectors.workers import (
    bcrs,
    bcrs_coefficients,
    dagc_r,
    deadline,
    fit_iterations,
)


def test_bcrs_ends_all_uploads_together():
    bandwidths = np.array([1e6, 4e6, 1e8])
    latencies = np.array([0.1, 0.3, 0.0])
    ratios = np.asarray(bcrs(bandwidths, latencies, 1e7, 0.01), np.float64)
    np.testing.assert_allclose(
        latencies[:2] + ratios[:2] * 1e7 / bandwidths[:2],
        [0.325, 0.325],  # of the second worker: 0.3 + 1e5 / 4e6
        rtol=1e-5,
    )
    assert ratios[2] == 1 and (ratios >= 0.01).all()
    same = bcrs(np.full(4, 1e6), np.zeros(4), 1e7, 0.05)
    np.testing.assert_allclose(same, 0.05, rtol=1e-6)


def test_bcrs_coefficients():
    p, ratios = [0, 3, 1], [0.5, 0.1, 0.3]
    np.testing.assert_allclose(bcrs_coefficients(p, ratios, 0), [0, 0.75, 0.25])
    np.testing.assert_allclose(bcrs_coefficients(p, ratios, 1), [0, 0.25, 0.75])
    np.testing.assert_allclose(bcrs_coefficients(p, ratios), [0, 0.5, 0.5])
    with pytest.raises(ValueError, match="mix must be in"):
        bcrs_coefficients(p, ratios, 2)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (([0, 1], [0, 0], 1, 0.1), "bandwidths must be positive"),
        (([1, 1], [0, -1], 1, 0.1), "latencies must be"),
        (([1, 1], [0, 0], 0, 0.1), "bits must be positive"),
        (([1, 1], [0, 0], 1, 1.1), r"ratio must be in \(0, 1\]"),
        (([1, 1], [0], 1, 0.1), "one entry per worker"),
    ],
)
def test_bad_links(arguments, text):
    with pytest.raises(ValueError, match=text):
        bcrs(*arguments)
    if "entry" not in text:
        traced = [jnp.asarray(a, jnp.float32) for a in arguments]
        assert np.isnan(jax.jit(bcrs)(*traced)).any()


@pytest.mark.parametrize("criterion", EXACT)
def test_deadline_against_a_dense_scan(criterion):
    rng = np.random.default_rng(3)
    choose = jax.jit(functools.partial(deadline, criterion=criterion))
    rule = jax.vmap(
        lambda p, mean, caps: dagc_r(p, mean, criterion=criterion, max_ratio=caps)
    )
    for _ in range(3):
        n, bits = 6, 1e7
        p = rng.dirichlet(np.ones(n))
        bandwidths, latencies = 10 ** rng.uniform(5, 7, n), rng.uniform(0, 0.1, n)
        a, b, other = 500.0, 20.0, 0.05
        found = choose(p, 0.05, (bandwidths, latencies, bits), (a, b), other)
        ratios = np.asarray(found.ratios, np.float64)
        ends = latencies + ratios * bits / bandwidths
        np.testing.assert_allclose(ends.max(), found.seconds, rtol=1e-3)
        own = (ends.max() + other) * (a + b * PLAIN[criterion](p, ratios))
        np.testing.assert_allclose(found.total_seconds, own, rtol=1e-3)
        seconds = latencies.max() + np.geomspace(1e-4, 30, 300)
        caps = (seconds[:, None] - latencies) * bandwidths / bits
        caps = np.clip(caps, 1e-12, 1)
        mean = np.minimum(0.05, caps.mean(1) * (1 - 1e-6))
        tried = np.asarray(rule(np.tile(p, (300, 1)), mean, caps), np.float64)
        totals = [
            (t + other) * (a + b * PLAIN[criterion](p, d))
            for t, d in zip(seconds, tried, strict=True)
        ]
        assert own <= np.min(totals) * (1 + 1e-4)


def test_deadline_depends_on_what_else_a_round_takes():
    links = np.array([1e5, 1e6, 1e7]), np.zeros(3), 1e7
    p = [0.5, 0.3, 0.2]
    chosen = [
        deadline(p, 0.1, links, (0.0, 1.0), other) for other in (0.01, 1.0, 100.0)
    ]
    seconds = [float(c.seconds) for c in chosen]
    assert seconds == sorted(seconds) and seconds[-1] > 1.5 * seconds[0]
    free = dagc_r(p, 0.1, criterion="psi")
    np.testing.assert_allclose(chosen[-1].ratios, free, rtol=0.1)
    with pytest.raises(ValueError, match="compute and download, must be positive"):
        deadline(p, 0.1, links, (0.0, 1.0), 0.0)
    with pytest.raises(ValueError, match="b > 0"):
        deadline(p, 0.1, links, (1.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="criterion must be one of"):
        deadline(p, 0.1, links, (0.0, 1.0), 1.0, criterion="paper")


def test_fit_iterations():
    x = np.array([1.0, 2.0, 5.0, 3.0])
    np.testing.assert_allclose(fit_iterations(x, 100 + 7 * x), (100, 7))
    assert fit_iterations(x, 100 - 7 * x) == (100 - 7 * x.mean(), 0)
    a, b = fit_iterations(x, -1 + 2 * x)  # a would be negative
    assert a == 0
    np.testing.assert_allclose(b, np.sum(x * (2 * x - 1)) / np.sum(x * x))
    for bad in ([1, 2], [1, 1, 1], [1, 2, np.inf]):
        with pytest.raises(ValueError, match="at least 3 runs|must be finite"):
            fit_iterations(bad, bad)

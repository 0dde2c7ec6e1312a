"""Rounds over links that differ by worker: by hand, and against small time steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcjax.network import ETHERNET_TCP, rounds
from gcjax.network.rounds import clock, constant, lognormal, round_seconds, varying
from gcjax.selectors.workers import bcrs

PLAIN = constant([1e6, 2e6, 4e6], [0.1, 0.2, 0.0], overhead=1.0)


def test_a_round_by_hand():
    up = rounds.upload_seconds(PLAIN, [1e6, 1e6, 1e6])
    np.testing.assert_allclose(up, [1.1, 0.7, 0.25])
    # The second worker computes longest and ends last: 2 + 0.7; download 1e6 at 1 Mb/s.
    seconds = round_seconds(PLAIN, [1e6, 1e6, 1e6], 1e6, [1.0, 2.0, 0.5])
    np.testing.assert_allclose(seconds, 2.7 + 1.1)
    np.testing.assert_allclose(round_seconds(PLAIN, [0, 0, 4e6], 0, 0.5), 1.5)
    down = constant([1e6], 0.0, download_bits_per_s=1e7, overhead=1.0)
    np.testing.assert_allclose(round_seconds(down, [1e6], 1e6, 0.0), 1.1)
    framed = constant([1e6])
    np.testing.assert_allclose(round_seconds(framed, [1e6], 0, 0.0), ETHERNET_TCP)


def test_the_slowest_of_all_is_what_counts():
    slow = [round_seconds(PLAIN, [b, 1e5, 1e5], 1e5, 0.1) for b in (1e3, 1e4, 1e6, 2e6)]
    assert slow[0] == slow[1] < slow[2] < slow[3]


def test_bcrs_fills_the_round_and_does_not_lengthen_it():
    bits, links = 1e7, PLAIN
    ratios = bcrs(links.upload_bits_per_s, links.latency_s, bits, 0.05)
    own = round_seconds(links, np.asarray(ratios, np.float64) * bits, 0, 0.0)
    uniform = round_seconds(links, np.full(3, 0.05) * bits, 0, 0.0)
    np.testing.assert_allclose(own, uniform, rtol=1e-6)
    assert ratios.sum() > 3 * 0.05 * 1.5


def test_the_clock_adds_rounds():
    up = np.array([[1e6, 1e6, 1e6], [0, 2e6, 0], [1e5, 1e5, 1e5]])
    ends = clock(PLAIN, up, [1e6, 0, 1e5], 0.5)
    each = [
        round_seconds(PLAIN, u, d, 0.5) for u, d in zip(up, [1e6, 0, 1e5], strict=True)
    ]
    np.testing.assert_allclose(ends, np.cumsum(each))


def test_a_trace_by_hand():
    # 2 s at 0.5 and 2 s at 1.5 of the mean, 1 Mbit/s; again and again.
    links = varying(constant([1e6], overhead=1.0), [0, 2, 4], [1, 3])
    seconds = lambda bits, at: rounds.upload_seconds(links, bits, at)[0]
    np.testing.assert_allclose(seconds(1e6, 0), 2)
    np.testing.assert_allclose(seconds(1e6, 1), 1 + 0.5 / 1.5)
    np.testing.assert_allclose(seconds(3e6, 2), 2)
    np.testing.assert_allclose(seconds(40e6, 0.7), 40)  # ten whole periods
    late = links._replace(latency_s=np.array([1.0]))
    np.testing.assert_allclose(rounds.upload_seconds(late, 1e6, 0), 2 + 0.5 / 1.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_a_trace_against_small_time_steps(seed):
    rng = np.random.default_rng(seed)
    links = constant(10 ** rng.uniform(5, 7, 3), rng.uniform(0, 0.2, 3), overhead=1.1)
    links = lognormal(links, rng.uniform(0, 2), 0.5, 7, seed)
    np.testing.assert_allclose(links.speed.mean(1), 1)
    bits, start, step = 10 ** rng.uniform(4, 7, 3), rng.uniform(0, 9), 1e-3
    found = rounds.upload_seconds(links, bits, start)
    for i in range(3):
        at = start + links.latency_s[i]
        left = 1.1 * bits[i] / links.upload_bits_per_s[i]
        times = at + step * np.arange(int(left / links.speed[i].min() / step) + 2)
        done = np.cumsum(links.speed[i][(times % 3.5 // 0.5).astype(int)] * step)
        expected = step * np.searchsorted(done, left) + links.latency_s[i]
        # An edge within a step moves it by up to the ratio of two speeds.
        slack = 10 * step * links.speed[i].max() / links.speed[i].min()
        assert abs(found[i] - expected) <= slack


def test_a_trace_matters_only_where_it_varies():
    same = lognormal(PLAIN, 0.0, 1.0, 5, 0)
    up = np.full((4, 3), 3e5)
    np.testing.assert_allclose(clock(same, up, 1e5, 0.1), clock(PLAIN, up, 1e5, 0.1))
    shaky = lognormal(PLAIN, 1.0, 1.0, 50, 0)
    assert clock(shaky, up, 1e5, 0.1)[-1] > clock(PLAIN, up, 1e5, 0.1)[-1]


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: constant([1e6, 0]), "must be positive"),
        (lambda: constant([]), "must be positive"),
        (lambda: constant([1e6], overhead=0), "must be positive"),
        (lambda: constant([1e6, 1e6], [0.1] * 3), "one number or one per worker"),
        (lambda: constant([1e6], -1), "latencies must be seconds >= 0"),
        (lambda: varying(PLAIN, [0, 1, 1], [1, 1]), "must ascend from 0"),
        (lambda: varying(PLAIN, [0, 1], [1, 1]), r"shape \[3, 1\], got \[2\]"),
        (lambda: varying(PLAIN, [0, 1], [0]), "positive and finite"),
        (lambda: lognormal(PLAIN, -1, 1, 1, 0), "spread must be >= 0"),
        (lambda: round_seconds(PLAIN, [-1, 0, 0], 0, 0), "bits must be >= 0"),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError, match=text) as error:
        make()
    assert "\n" not in str(error.value)


def test_uneven_links_go_with_or_against_the_weights():
    weights = np.array([0.1, 0.6, 0.3])
    up = {order: rounds.uneven(weights, order) for order in ("with", "against")}
    speeds = {order: links.upload_bits_per_s for order, links in up.items()}
    assert speeds["with"].argsort().tolist() == [0, 2, 1]
    assert speeds["against"].argsort().tolist() == [1, 2, 0]
    across = rounds.uneven(weights, "across").upload_bits_per_s
    for speed in (*speeds.values(), across):
        assert speed.mean() == pytest.approx(8.4e6)
        np.testing.assert_allclose(np.sort(speed), np.sort(across))
    with pytest.raises(ValueError, match="order must be"):
        rounds.uneven(weights, "sideways")

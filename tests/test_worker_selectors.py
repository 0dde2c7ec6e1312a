"""Ratios and thresholds per worker: test vectors, independent readings, brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from worker_cases import (
    EXACT,
    FLICKR,
    ONE_HALF,
    PLAIN,
    arithmetic,
    plain_phi,
    random_p,
    released_geometric,
)

from gcjax.selectors import workers
from gcjax.selectors.workers import (
    accordion,
    dagc_a,
    dagc_r,
    largest_remainder,
    power_rule,
)

SCORES = {"phi_exact": workers.phi, "psi": workers.psi, "omega": workers.omega}


# --- An independent reading of the paper, in float64 and loops. -----------------------


def algorithm_2(p, mean):
    """Candidate allocations of Theorem 4, p descending: [(phi, ratios)], in order."""
    n, found = len(p), []
    if n == 1:
        return [(1 / mean, np.array([mean]))]
    total = sum(x ** (2 / 3) for x in p)
    for j in reversed(range(n)):
        if j > 0 and p[j] == p[j - 1]:
            continue
        r = n - 1 if j != n - 1 else n - 2
        q = (total - p[j] ** (2 / 3)) / p[r] ** (2 / 3)
        value = (1 + q) * (p[j] + p[r] * q) / (n * mean)
        ratios = [n * mean / (1 + q) * (x / p[r]) ** (2 / 3) for x in p]
        ratios[j] = n * mean / (1 + q)
        found.append((value, np.array(ratios)))
    return found


def literal(p, mean):
    best = (np.inf, None)
    for candidate in algorithm_2(p, mean):
        if candidate[0] < best[0]:
            best = candidate
    return best


@pytest.mark.parametrize(
    "p, expected, value",
    [
        (ONE_HALF, [3.4872, *[0.7513] * 10], 0.974),
        (
            arithmetic(10, 10),
            [1.5155, 1.4127, 1.3060, 1.1947, 1.0781, 0.9547, 0.8227, 0.6791]
            + [0.5183, 0.5183],
            1.319,
        ),
        (
            arithmetic(10, 1000),
            [1.6375, 1.5140, 1.3852, 1.2501, 1.1072, 0.9545, 0.7883, 0.6022]
            + [0.3805, 0.3805],
            1.487,
        ),
    ],
)
def test_theorem_4_vectors(p, expected, value):
    ratios = dagc_r(p, 0.01)
    np.testing.assert_allclose(ratios / 0.01, expected, atol=6e-5)
    np.testing.assert_allclose(workers.phi(p, ratios) * 0.01, value, atol=6e-4)
    reported, own = literal(p, 0.01)
    np.testing.assert_allclose(ratios, own, rtol=2e-6)
    np.testing.assert_allclose(reported, workers.phi(p, own), rtol=1e-5)


def test_phi_exact_vectors():
    ratios = dagc_r(ONE_HALF, 0.01, criterion="phi_exact") / 0.01
    np.testing.assert_allclose(ratios, [2.15, *[0.885] * 10], atol=6e-3)
    np.testing.assert_allclose(workers.phi(ONE_HALF, ratios), 0.927, atol=6e-4)


@pytest.mark.parametrize("n, value", [(5, 1.17), (200, 2.94)])
def test_theorem_4_is_worse_than_uniform_on_arithmetic_series(n, value):
    p = arithmetic(n, 100)
    p = np.append(p, np.zeros(200 - n))  # the others do not count
    paper = workers.phi(p, dagc_r(p, 0.01)) * 0.01
    np.testing.assert_allclose(paper, value, atol=6e-3)
    exact = dagc_r(p, 0.01, criterion="phi_exact")
    np.testing.assert_allclose(exact[:n], 0.01, rtol=1e-6)


def test_psi_vectors():
    """Of sum p^2 / d^2 in units of the mean ratio, uniform and by the 2/3 rule."""
    square = lambda p, d: workers.psi(p, d) ** 2 / len(p)
    for p, uniform, best in (
        (FLICKR, 0.179, 0.0396),
        (arithmetic(10, 100), 0.139, 0.083),
        (released_geometric(10, 100), 0.281, 0.056),
        (np.logspace(2, 0, 10), 0.253, 0.061),
    ):
        ones = np.full(len(p), 0.01)
        np.testing.assert_allclose(square(p, ones) * 1e-4, uniform, atol=6e-4)
        ratios = dagc_r(p, 0.01, criterion="psi")
        np.testing.assert_allclose(square(p, ratios) * 1e-4, best, atol=6e-4)
    # On Flickr Theorem 4 is nearly as good, and the tighter omega sees half the gain.
    np.testing.assert_allclose(
        square(FLICKR, dagc_r(FLICKR, 0.01)) * 1e-4, 0.0396, 0.01
    )
    omega = lambda **kw: workers.omega(FLICKR, dagc_r(FLICKR, 0.01, **kw)) * 0.01
    np.testing.assert_allclose(omega(criterion="psi"), 0.68, atol=6e-3)
    np.testing.assert_allclose(omega(criterion="omega"), 0.65, atol=6e-3)


def test_theorem_4_is_not_monotone_with_an_interior_winner():
    p = released_geometric(10, 100)
    ratios = np.asarray(dagc_r(p, 0.01))
    assert np.argmin(ratios) not in (8, 9), "an interior worker holds the minimum"
    np.testing.assert_allclose(ratios.min(), ratios[-1], rtol=1e-6)
    assert (np.diff(ratios) > 1e-5).any() and (np.diff(p) <= 0).all()
    np.testing.assert_allclose(ratios, literal(p, 0.01)[1], rtol=2e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 10]))
def test_paper_equals_the_literal_reading(seed, n):
    p = np.sort(random_p(seed, n))[::-1].astype(np.float32).astype(np.float64)
    ratios = np.asarray(dagc_r(p, 0.001), np.float64)
    candidates = algorithm_2(p / p.sum(), 0.001)
    least = min(value for value, _ in candidates)
    # Two phi in float32, of ten roundings each, may differ by 2e-6 and yet be equal.
    near = [d for value, d in candidates if value <= least * (1 + 2e-6)]
    assert any(np.allclose(ratios, d, rtol=1e-5, atol=0) for d in near)
    np.testing.assert_allclose(ratios.sum(), n * 0.001, rtol=1e-6)


def test_ties_go_by_position():
    p = np.array([0.05, 0.25, 0.25, 0.25, 0.1, 0.05, 0.05])  # in no order
    for criterion in workers.CRITERIA:
        ratios = np.asarray(dagc_r(p, 0.1, criterion=criterion))
        assert ratios[[0, 5, 6]].std() < 1e-8, "the smallest are alike"
    # An interior tie group that wins: its first worker gets the least ratio.
    base = released_geometric(10, 100)
    p = np.sort(np.append(base, base[6]))  # ascending
    own = literal(p[::-1] / p.sum(), 0.1)[1]
    assert own[6] < 0.5 * own[7], "the example needs a winner among the twins"
    np.testing.assert_allclose(dagc_r(p[::-1], 0.1), own, rtol=2e-6)
    own[6], own[7] = own[7], own[6]  # ascending, it is still the first of the twins
    np.testing.assert_allclose(dagc_r(p, 0.1), own[::-1], rtol=2e-6)


def test_paper_is_not_the_minimum_of_phi():
    """Uniform beats it wherever the largest share is at most 2 / n."""
    rng, p = np.random.default_rng(0), np.zeros((4, 100, 22))
    for i, n in enumerate((3, 5, 10, 22)):  # the others have no data and do not count
        p[i, :, :n] = rng.dirichlet(np.full(n, 3.0), 100)
    p, n = p.reshape(400, 22), np.repeat((3, 5, 10, 22), 100)
    exact, paper = (
        jax.vmap(lambda p, c=c: workers.phi(p, dagc_r(p, 0.01, criterion=c)))(p)
        for c in ("phi_exact", "paper")
    )
    uniform, flat = 100.0, p.max(1) <= 2 / n
    assert (exact <= np.minimum(uniform, paper) * (1 + 1e-6)).all()
    assert 50 < flat.sum() < 350, "both kinds of profiles were met"
    assert (paper[flat] > uniform * (1 + 1e-6)).all()
    np.testing.assert_allclose(exact[flat], uniform, rtol=1e-6)
    assert (exact[p.max(1) > 2 / n * 1.01] < uniform).all()


# --- Brute force. ---------------------------------------------------------------------


def constrained(score, p, total, caps, start):
    """Least score by SLSQP, from several starts; phi through its floor."""
    best = np.inf
    for x0 in start:
        result = optimize.minimize(
            lambda d: score(p, np.maximum(d, 1e-9)),
            x0,
            method="SLSQP",
            bounds=[(1e-6, c) for c in caps],
            constraints={"type": "eq", "fun": lambda d: d.sum() - total},
            options={"maxiter": 500, "ftol": 1e-12},
        )
        if abs(result.x.sum() - total) < 1e-6 * total:
            best = min(best, result.fun)
    return best


@pytest.mark.parametrize("criterion", EXACT)
@pytest.mark.parametrize("capped", [False, True])
def test_exact_criteria_against_brute_force(criterion, capped):
    score, rng = PLAIN[criterion], np.random.default_rng(0)
    for seed in range(8):
        n = 2 + 2 * (seed % 2)
        p, mean = random_p(seed, n), 0.2
        caps = rng.uniform(0.15, 1, n) if capped else np.ones(n)
        if caps.mean() < mean * 1.05:
            continue
        ratios = dagc_r(p, mean, criterion=criterion, max_ratio=caps)
        ratios = np.asarray(ratios, np.float64)
        assert (ratios <= caps * (1 + 1e-6)).all()
        np.testing.assert_allclose(ratios.sum(), n * mean, rtol=1e-6)
        own = score(p, ratios)
        # Convex: nothing near is better, and from afar SLSQP finds nothing better.
        starts = [ratios, np.minimum(caps, mean), caps * n * mean / caps.sum()]
        other = constrained(score, p, n * mean, caps, starts)
        assert own <= other * (1 + 1e-4)
        for _ in range(300):
            step = rng.normal(size=n) * 10 ** rng.uniform(-4, -1)
            near = ratios + step - step.mean()
            if (near > 1e-6).all() and (near <= caps).all():
                assert own <= score(p, near) * (1 + 1e-5)


def test_phi_exact_against_a_scan_of_its_floor():
    """At a fixed floor the best ratios are max(m, c p^(2/3)); scan m densely."""
    for seed in range(6):
        p = np.sort(random_p(seed, 8))[::-1]
        w, best = p ** (2 / 3), np.inf
        for m in np.linspace(1e-3, 1, 1000):
            for k in range(9):  # k free workers
                c = (8 - (8 - k) * m) / w[:k].sum() if k else 0
                d = np.append(c * w[:k], np.full(8 - k, m))
                if (k or m == 1) and d.min() >= m * (1 - 1e-9):
                    best = min(best, plain_phi(p, d))
        own = plain_phi(p, np.asarray(dagc_r(p, 0.1, criterion="phi_exact")) / 0.1)
        assert own <= best * (1 + 1e-6) and own >= best * (1 - 1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.99), st.sampled_from([0.0, 0.5, 2.0]))
def test_power_rule_water_filling(seed, mean, exponent):
    p = random_p(seed, 20)
    ratios = np.asarray(power_rule(p, mean, exponent), np.float64)
    np.testing.assert_allclose(ratios.sum(), 20 * mean, rtol=1e-6)
    weights, low, high = p**exponent, 0.0, 1e12
    for _ in range(200):  # c by bisection in float64
        c = (low + high) / 2
        low, high = (
            (c, high) if np.minimum(1, c * weights).sum() < 20 * mean else (low, c)
        )
    np.testing.assert_allclose(ratios, np.minimum(1, c * weights), rtol=2e-4, atol=1e-6)


def test_zeta_counts_like_p():
    p, zeta = random_p(1, 7), np.random.default_rng(2).lognormal(size=7)
    for criterion, exponent in (("psi", 2 / 3), ("omega", 1 / 2)):
        ratios = dagc_r(p, 0.01, criterion=criterion, zeta=zeta)
        expected = (p * zeta) ** exponent
        np.testing.assert_allclose(ratios, 0.07 * expected / expected.sum(), rtol=1e-5)
        score = functools.partial(SCORES[criterion], zeta=zeta)
        assert score(p, ratios) < score(p, dagc_r(p, 0.01, criterion=criterion))


# --- Laws of all rules. ---------------------------------------------------------------

RULES = {
    **{c: functools.partial(dagc_r, criterion=c) for c in workers.CRITERIA},
    "power": functools.partial(power_rule, exponent=1.5),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("n", [1, 2, 1000])
def test_sums_order_and_caps(rule, n):
    rule = jax.jit(rule)
    for seed, (mean, cap) in enumerate([(0.001, 1.0), (0.3, 0.35), (0.9, 1.0)]):
        p = random_p(seed, n)
        ratios = np.asarray(rule(p, mean, max_ratio=cap))
        assert ratios.dtype == np.float32 and (ratios <= np.float32(cap)).all()
        np.testing.assert_allclose(ratios.sum(dtype=np.float64), n * mean, rtol=2e-6)
        order = np.random.default_rng(seed).permutation(n)
        np.testing.assert_allclose(
            rule(p[order], mean, max_ratio=cap), ratios[order], rtol=1e-4
        )
        np.testing.assert_allclose(
            rule(p * 7e5, mean, max_ratio=cap), ratios, rtol=1e-4, err_msg="counts"
        )


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_small_cases_and_saturation(rule):
    np.testing.assert_allclose(rule([3.0], 0.2), [0.2], rtol=1e-6)
    np.testing.assert_allclose(rule([5, 5, 5], 0.2), [0.2] * 3, rtol=1e-6)
    np.testing.assert_allclose(rule(random_p(0, 9), 0.5, max_ratio=0.5), 0.5, rtol=1e-6)
    # A steep profile at a large mean: the largest are clipped, the sum stays.
    ratios = np.asarray(rule(FLICKR, 0.5), np.float64)
    assert (ratios == 1).sum() >= 2 or rule is RULES["phi_exact"]
    np.testing.assert_allclose(ratios.sum(), 7.5, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_zeros_take_no_part(rule):
    np.testing.assert_allclose(rule([0.6, 0.0, 0.4], 0.1)[1], 0)
    p = random_p(4, 12, zeros=5)
    ratios = np.asarray(rule(p, 0.05))
    assert (ratios[p == 0] == 0).all() and (ratios[p > 0] > 0).all()
    np.testing.assert_allclose(ratios[p > 0], rule(p[p > 0], 0.05), rtol=1e-5)
    np.testing.assert_allclose(rule([0, 0, 2], 0.1), [0, 0, 0.1], rtol=1e-6)
    for score in SCORES.values():
        np.testing.assert_allclose(
            score(p, ratios), score(p[p > 0], ratios[p > 0]), 1e-5
        )


def test_n_2_is_uniform_for_the_paper():
    np.testing.assert_allclose(dagc_r([0.99, 0.01], 0.1), [0.1, 0.1], rtol=1e-6)


def test_the_excess_goes_to_the_others_by_the_same_rule():
    p, mean = released_geometric(10, 1000), 0.3
    ratios = np.asarray(dagc_r(p, mean), np.float64)
    rest, total, capped = p, 10 * mean, 0
    while True:  # by hand: clip, solve the rest again
        own = literal(rest, total / len(rest))[1]
        over = own > 1
        if not over.any():
            break
        capped, total, rest = capped + over.sum(), total - over.sum(), rest[~over]
    assert capped >= 1
    np.testing.assert_allclose(np.sort(ratios)[::-1][:capped], 1)
    np.testing.assert_allclose(np.sort(ratios), np.sort([*own, *[1] * capped]), 1e-5)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_jit_vmap_and_loop_agree(rule):
    ps = np.stack([random_p(seed, 8) for seed in range(6)])
    means = np.float32([0.01, 0.1, 0.2, 0.4, 0.6, 0.9])
    loop = np.stack([rule(p, m) for p, m in zip(ps, means, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(rule))(ps, means), loop, rtol=1e-5)


@functools.cache
def jitted(criterion):
    return jax.jit(functools.partial(dagc_r, criterion=criterion))


BAD = [
    (dict(p=[0.5, -0.5]), "p must be finite, not negative"),
    (dict(p=[0.5, np.nan]), "p must be finite, not negative"),
    (dict(p=[0.0, 0.0]), "not all 0"),
    (dict(p=[0.5, np.inf]), "p must be finite"),
    (dict(mean_ratio=0.6, max_ratio=0.5), r"mean_ratio must be in \(0, max_ratio\]"),
    (dict(mean_ratio=0.0), "mean_ratio must be in"),
    (dict(mean_ratio=np.nan), "mean_ratio must be in"),
    (dict(max_ratio=1.5), r"max_ratio must be in \(0, 1\]"),
    (dict(zeta=[1.0, 0.0]), "zeta must be positive"),
]


@pytest.mark.parametrize("changes, text", BAD)
@pytest.mark.parametrize("criterion", ["paper", "psi"])
def test_bad_values(changes, text, criterion):
    if "zeta" in changes and criterion == "paper":
        pytest.skip("has no zeta")
    arguments = dict(p=[0.7, 0.3], mean_ratio=0.1, max_ratio=1.0) | changes
    rule = functools.partial(dagc_r, criterion=criterion)
    with pytest.raises(ValueError, match=text) as error:
        rule(**arguments)
    assert "\n" not in str(error.value)
    traced = {k: jnp.asarray(v, jnp.float32) for k, v in arguments.items()}
    assert np.isnan(jitted(criterion)(**traced)).all()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(p=[]), r"p must hold one number per worker, \[n\], got shape \[0\]"),
        (dict(p=[[1.0]]), r"got shape \[1, 1\]"),
        (dict(p=[1.0, 2.0], zeta=[1.0], criterion="psi"), r"got \[1\] and \[\] for"),
        (dict(p=[1.0], criterion="best"), "criterion must be one of"),
        (dict(p=[1.0], zeta=[1.0]), "criterion 'paper' has none"),
    ],
)
def test_bad_shapes_and_names(arguments, text):
    with pytest.raises(ValueError, match=text):
        dagc_r(mean_ratio=0.1, **arguments)


# --- Thresholds. ----------------------------------------------------------------------


def test_dagc_a():
    p = arithmetic(10, 1000)
    expected = [0.588, 0.636, 0.696, 0.771, 0.870, 1.010, 1.222, 1.600, 2.533, 58.84]
    thresholds = dagc_a(p, 0.05)
    np.testing.assert_allclose(thresholds / 0.05, expected, rtol=1e-3)
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_allclose(dagc_a(p[order], 0.05), thresholds[order], rtol=1e-6)
    np.testing.assert_allclose(10 / np.sum(1 / np.asarray(thresholds)), 0.05, rtol=1e-6)
    np.testing.assert_allclose(dagc_a([4, 4], 0.3), 0.3, rtol=1e-6)
    np.testing.assert_allclose(dagc_a([9], 0.3), 0.3, rtol=1e-6)


def test_dagc_a_zeros_and_bad_values():
    thresholds = np.asarray(dagc_a([0.5, 0, 0.5], 0.1))
    np.testing.assert_allclose(thresholds, [0.1, np.inf, 0.1], rtol=1e-6)
    for p, mean in (([0.5, np.nan], 0.1), ([1, -1], 0.1), ([0, 0], 1), ([1, 1], 0)):
        with pytest.raises(ValueError, match="must be"):
            dagc_a(p, mean)
        assert np.isnan(jax.jit(dagc_a)(jnp.float32(p), jnp.float32(mean))).all()


# --- Whole numbers. -------------------------------------------------------------------


def remainder_reference(ratios, size):
    exact = np.asarray(ratios, np.float32).astype(np.float64) * size  # 55 of 53 bits
    k = np.floor(exact).astype(np.int64)
    missing = int(np.floor((exact - k).sum() + 0.5))
    k[np.argsort(-(exact - k), kind="stable")[:missing]] += 1
    return k


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from([1, 2, 10, 1000]), st.integers(1, 2**31 - 1)
)
def test_largest_remainder(seed, n, size):
    rng = np.random.default_rng(seed)
    ratios = (rng.random(n) ** rng.integers(1, 12)).astype(np.float32)
    ratios[rng.random(n) < 0.1] = 1
    k = np.asarray(largest_remainder(ratios, size)).astype(np.int64)
    exact = ratios.astype(np.float64) * size
    assert (np.abs(k - exact) < 1 + 1e-6).all() and (k <= size).all() and (k >= 0).all()
    total = float(np.sum(ratios.astype(np.longdouble)) * size)
    assert abs(k.sum() - total) <= 0.5 + 1e-6 * n
    if size < 2**28:
        np.testing.assert_array_equal(k.sum(), remainder_reference(ratios, size).sum())


def test_largest_remainder_by_hand():
    k = jax.jit(largest_remainder, static_argnums=1)
    np.testing.assert_array_equal(k(jnp.float32([0.25, 0.25, 0.5]), 6), [2, 1, 3])
    np.testing.assert_array_equal(k(jnp.float32([0.0, 1.0, 0.0]), 7), [0, 7, 0])
    np.testing.assert_array_equal(k(jnp.float32([1e-3] * 10), 235_690).sum(), 2357)
    tiny = k(jnp.float32([1e-30, 1e-37, 0.3]), 10)
    np.testing.assert_array_equal(tiny, [0, 0, 3])
    ratios = dagc_r(FLICKR, 0.001)
    assert largest_remainder(ratios, 235_690).sum() == round(15 * 0.001 * 235_690)
    ratios = np.float32([1, 0.5, 0])
    np.testing.assert_array_equal(
        largest_remainder(ratios, 2**31 - 1), [2**31 - 1, 2**30, 0]
    )
    for ratios, size in (([0.5], 0), ([1.5], 10), ([np.nan], 10)):
        with pytest.raises(ValueError, match="must be in"):
            largest_remainder(ratios, size)


# --- Over time. -----------------------------------------------------------------------


@functools.cache
def accordion_update(made):
    return jax.jit(made.update)


def run_accordion(made, norms):
    state, out = made.init(len(norms[0])), []
    update = accordion_update(made)
    for row in norms:
        values, state = update(np.float32(row), state)
        out.append(np.asarray(values))
    return np.array(out)


def test_accordion_by_hand():
    norms = [[4, 4], [3, 2], [3, 2], [1, 2.1], [0.9, 4]]
    got = run_accordion(accordion(0.01, 0.1), norms)
    expected = [[0.1, 0.1], [0.01, 0.1], [0.01, 0.01], [0.1, 0.01], [0.01, 0.1]]
    np.testing.assert_allclose(got, expected)
    # Thresholds: aggressive is the larger one.
    got = run_accordion(accordion(0.5, 0.005), norms)
    np.testing.assert_allclose(got[:2], [[0.005, 0.005], [0.5, 0.005]])


MATCHED = {
    rounds: accordion(0.004, 0.05, mean_ratio=0.01, rounds=rounds) for rounds in (1, 30)
}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 30]))
def test_matched_accordion_keeps_its_budget(seed, rounds):
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(0, rng.uniform(0, 2), (rounds, 3))
    got = run_accordion(MATCHED[rounds], norms)
    np.testing.assert_allclose(got.mean(0, dtype=np.float64), 0.01, rtol=1e-4)
    assert got.min() >= 0.004 * (1 - 1e-6) and got.max() <= 0.05 * (1 + 1e-6)


def test_matched_accordion_borrows_early_and_pays_back():
    norms = np.r_[10, 4, 2, 1, np.ones(60)][:, None]
    got = run_accordion(accordion(0.004, 0.05, mean_ratio=0.01, rounds=64), norms)[:, 0]
    np.testing.assert_allclose(got[:4], 0.05)
    np.testing.assert_allclose(got[4:30], 0.004)
    np.testing.assert_allclose(got[-5:], 0.01)


def test_accordion_errors():
    for arguments in (
        dict(aggressive=0, conservative=1),
        dict(aggressive=0.1, conservative=0.5, mean_ratio=0.05, rounds=3),
        dict(aggressive=0.1, conservative=0.5, mean_ratio=0.2),
        dict(aggressive=0.1, conservative=0.5, rounds=3),
    ):
        with pytest.raises(ValueError, match="accordion: "):
            accordion(**arguments)

"""Splits: exact partitions, sizes, label skew, real users, and tasks that use them."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcjax import batches, data, splits, tasks
from gcjax.selectors.workers import dagc_r
from gcjax.splits import FLICKR, Samples, arithmetic, by_user, flickr, geometric, skewed

REAL = Path(os.environ.get("GCJAX_DATA") or "/nonexistent")


def labels(n=3000, classes=10, seed=0):
    return np.random.default_rng(seed).integers(0, classes, n)


def assert_partition(shards, n, full=True):
    joined = np.concatenate(shards)
    assert len(set(joined.tolist())) == len(joined) and set(joined) <= set(range(n))
    assert not full or len(joined) == n
    assert all(len(shard) and (np.diff(shard) > 0).all() for shard in shards)


# --- Sizes. ---------------------------------------------------------------------------


@pytest.mark.parametrize("series", [arithmetic, geometric])
@pytest.mark.parametrize("skew", [1, 10, 1000])
def test_series(series, skew):
    for n in (2, 10, 200):
        shares = series(skew)(n)
        np.testing.assert_allclose([shares.sum(), shares[0] / shares[-1]], [1, skew])
        steps = np.diff(shares if series is arithmetic else np.log(shares))
        np.testing.assert_allclose(steps, steps[0], atol=1e-12)
    assert series(skew)(1) == [1.0]
    with pytest.raises(ValueError, match="must be >= 1, got 0.5"):
        series(0.5)


def test_the_released_series_repeats_its_last_value():
    shares = geometric(100, repeat_last=True)(10)
    assert shares[8] == shares[9] and shares[0] / shares[9] == pytest.approx(100)
    np.testing.assert_allclose(shares[1:9] / shares[:8], 100 ** (-1 / 8))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([1, 2, 10, 200]),
    st.sampled_from([1.0, 10.0, 1000.0]),
    st.sampled_from([None, 0.1, 0.5, 100.0]),
)
def test_skewed_is_an_exact_partition(seed, n, skew, concentration):
    y = labels(2000 + seed, seed=seed)
    samples = Samples(y)
    split = skewed(arithmetic(skew), concentration)
    shards = split(samples, n, seed)
    assert_partition(shards, len(y))
    wanted = arithmetic(skew)(n) * len(y)
    # What the smallest need to have a sample comes from the largest.
    short = (wanted < 1).sum()
    assert (np.abs([len(s) for s in shards] - wanted) <= 1 + short).all()
    for a, b in zip(shards, split(samples, n, seed), strict=True):
        np.testing.assert_array_equal(a, b)
    if n > 1:
        other = split(samples, n, seed + 1)
        assert any(not np.array_equal(a, b) for a, b in zip(shards, other, strict=True))


def test_every_worker_has_a_sample():
    shards = skewed(geometric(1e5), 0.5)(Samples(labels(400)), 30, 0)
    assert_partition(shards, 400)
    assert min(map(len, shards)) == 1
    with pytest.raises(ValueError, match="30 workers cannot share 20 samples"):
        skewed()(Samples(labels(20)), 30, 0)


def test_a_small_concentration_skews_labels():
    y = labels()

    def distance(concentration):  # mean total variation from the overall mix
        shards = skewed(None, concentration)(Samples(y), 20, 1)
        counts = splits.profile(shards, y)
        assert (counts.sum(0) == np.bincount(y)).all()
        mixes = counts / counts.sum(1, keepdims=True)
        return np.abs(mixes - counts.sum(0) / len(y)).sum(1).mean() / 2

    found = [distance(c) for c in (0.1, 0.5, 5.0, 1000.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.6 and found[1] > 0.3 and found[3] < 0.05


def test_shares_by_hand():
    shards = skewed((0.5, *[0.05] * 10))(Samples(labels(2000)), 11, 0)
    assert [len(s) for s in shards] == [1000] + [100] * 10
    np.testing.assert_allclose(splits.weights(shards), [0.5] + [0.05] * 10)
    with pytest.raises(ValueError, match="has 11 shares, for 10 workers"):
        skewed((0.5, *[0.05] * 10))(Samples(labels()), 10, 0)
    for bad in ((1, 0), (1, np.nan), ((1, 2),)):
        with pytest.raises(ValueError, match="one positive number each"):
            skewed(bad)
    with pytest.raises(ValueError, match="concentration must be positive"):
        skewed(None, 0)


# --- Flickr, and real users. ----------------------------------------------------------


def test_flickr_profile_on_cifar10_counts():
    assert FLICKR.shape == (15, 10) and FLICKR.sum() == 253_811
    np.testing.assert_allclose(FLICKR[0].sum() / FLICKR.sum(), 0.315, atol=5e-4)
    sums = FLICKR.sum(1)
    np.testing.assert_allclose(sums.std() / sums.mean(), 1.30, atol=5e-3)
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
    shards = flickr()(Samples(y), 15, 0)
    assert_partition(shards, 50_000, full=False)
    counts = splits.profile(shards, y)
    assert (np.abs(counts - 0.157 * FLICKR) <= 1).all() and counts.sum(1).min() == 3
    np.testing.assert_allclose(counts.sum(), 0.157 * FLICKR.sum(), rtol=1e-4)
    tiny = splits.profile(flickr(0.01)(Samples(y), 15, 0), y)
    assert tiny.sum(1).min() == 1
    with pytest.raises(
        ValueError, match=r"scale = 0.158 needs 50\d\d samples of label"
    ):
        flickr(0.158)(Samples(y), 15, 0)
    with pytest.raises(ValueError, match="15 workers and 10 labels, not 10 and 10"):
        flickr()(Samples(y), 10, 0)
    with pytest.raises(ValueError, match="scale must be positive"):
        flickr(0)


def test_by_user():
    users = np.array([7, 3, 3, 9, 3, 9, 5])
    shards = by_user()(Samples(np.zeros(7, int), users), 3, 0)
    assert [s.tolist() for s in shards] == [[1, 2, 4], [3, 5], [6]]
    with pytest.raises(ValueError, match=r"in \[1, 4\], the number of users, got 5"):
        by_user()(Samples(np.zeros(7, int), users), 5, 0)
    with pytest.raises(ValueError, match="who made a sample"):
        by_user()(Samples(np.zeros(7, int)), 2, 0)


def test_figure(tmp_path):
    y = labels(500)
    counts = splits.profile(skewed(arithmetic(10), 0.5)(Samples(y), 12, 0), y)
    assert counts.shape == (12, 10) and counts.sum() == 500
    drawing = splits.figure(counts, "twelve")
    drawing.savefig(tmp_path / "split.png")
    axes = drawing.axes[0]
    shown = axes.collections[0].get_offsets()
    assert len(shown) == (counts > 0).sum() and axes.get_title() == "twelve"
    areas = axes.collections[0].get_sizes()
    largest = np.unravel_index(counts.argmax(), counts.shape)
    assert tuple(shown[areas.argmax()][::-1]) == largest


# --- Batches. -------------------------------------------------------------------------


def test_workers_draw_from_their_own_shards():
    shards = [np.arange(100, 117), np.array([5]), np.arange(40, 90)]
    pick = batches.shard_sampler(shards, 3, 4)
    rows = np.stack([pick(step) for step in range(50)])
    assert rows.shape == (50, 3, 4)
    for worker, shard in enumerate(shards):
        stream = rows[:, worker].ravel()
        for epoch in range(len(stream) // len(shard)):  # each takes every sample once
            part = stream[epoch * len(shard) :][: len(shard)]
            np.testing.assert_array_equal(np.sort(part), shard)
    again = batches.shard_sampler(shards, 3, 4)
    np.testing.assert_array_equal(again(31), rows[31])
    assert not np.array_equal(batches.shard_sampler(shards, 4, 4)(31), rows[31])
    with pytest.raises(ValueError, match="0 samples for worker 1"):
        batches.shard_sampler([np.arange(3), np.arange(0)], 0, 4)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        batches.shard_sampler(shards, 0, 0)


def test_a_task_with_a_split():
    split = skewed(arithmetic(10), 0.5)
    task = tasks.image_classification("digits", "logistic", split=split)
    shards = task.shards(5, 4)
    assert_partition(shards, 1437)
    p = splits.weights(shards)
    np.testing.assert_allclose(p, arithmetic(10)(4), atol=1e-3)
    assert dagc_r(p, 0.1).shape == (4,)
    everything = data.load("digits")
    batch = task.batches(5, 4, 16)(3)
    assert batch["x"].shape == (4, 16, 8, 8, 1)
    pick = batches.shard_sampler(shards, 5, 16)(3)
    np.testing.assert_array_equal(batch["x"], everything["x_train"][pick])
    np.testing.assert_array_equal(batch["y"], task.labels[pick])
    assert tasks.image_classification("digits", "logistic").shards is None


# --- Data of users. -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GCJAX_DATA", raising=False)
    (tmp_path / "shakespeare_roles").mkdir()
    (tmp_path / "wisdm").mkdir()
    roles = {"hamlet/HAMLET": "To be, or " * 30, "hamlet/GHOST": "List! " * 20}
    roles |= {"macbeth/WITCH": "Double, double " * 10, "macbeth/SERVANT": "Ay."}
    path = tmp_path / "shakespeare_roles/by_role.json"
    path.write_text(json.dumps(roles))
    rng = np.random.default_rng(0)
    x = rng.normal(5, 3, (240, 43)).astype(np.float32)
    x[:, 30], x[::7, 33] = 0, np.nan
    users = np.repeat(np.arange(1, 13), 20)
    y = np.arange(240) % 3
    x[:, :5] += 9 * y[:, None]  # three well separated classes
    np.savez(tmp_path / "wisdm/wisdm.npz", features=x, labels=y, users=users)
    return tmp_path


def test_role_wise_text(folder):
    got = data.load("shakespeare_roles", folder)
    words = lambda part, i: "".join(got["vocab"][t] for t in got[part][i])
    assert got["roles"][0] == "hamlet/HAMLET" and len(got["train"]) == 4
    assert words("train", 0) + words("valid", 0) == "To be, or " * 30
    assert len(got["train"][1]) == 108 and len(got["valid"][1]) == 12
    task = tasks.language_model(
        "shakespeare_roles",
        data_dir=folder,
        d_model=8,
        num_layers=1,
        num_heads=1,
        seq_len=10,
        eval_tokens=20,
        split=by_user(),
    )
    shards = task.shards(0, 3)  # the servant has too few tokens for a window
    assert [len(s) for s in shards] == [26, 13, 10]
    assert [set(task.labels[s]) for s in shards] == [{0}, {1}, {0}]
    batch = task.batches(0, 3, 4)(0)["tokens"]
    assert batch.shape == (3, 4, 11)
    letters = {got["vocab"][t] for t in batch[2].ravel()}
    assert letters <= set("List! ")
    assert np.isfinite(task.evaluate(*task.init(jax.random.key(0)))["perplexity"])
    with pytest.raises(ValueError, match="no role has the 301 tokens"):
        tasks.language_model(
            "shakespeare_roles", data_dir=folder, seq_len=300, num_heads=1
        )


@pytest.mark.parametrize("hidden", [0, 7])
def test_activity_recognition(folder, hidden):
    task = tasks.activity_recognition(data_dir=folder, hidden=hidden, split=by_user())
    shards = task.shards(0, 10)  # users 6 and 12 are for the test
    assert [len(s) for s in shards] == [20] * 10
    with pytest.raises(ValueError, match=r"\[1, 10\], the number of users"):
        task.shards(0, 11)
    batch = task.batches(0, 10, 200)(0)  # ten epochs
    assert batch["x"].dtype == np.float32 and np.isfinite(batch["x"]).all()
    np.testing.assert_allclose(batch["x"].mean((0, 1)), 0, atol=1e-4)
    params, state = task.init(jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == (44 * 3 if not hidden else 44 * 7 + 8 * 3)
    step = jax.jit(jax.grad(lambda p, b: task.loss(p, state, b, None)[0]))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    for _ in range(150):
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, step(params, flat))
    assert task.evaluate(params, state)["accuracy"] > 0.8  # chance: a third


def test_damaged_user_data(folder):
    (folder / "shakespeare_roles/by_role.json").write_text('{"a/B": 3}')
    with pytest.raises(ValueError, match="not an object of texts by role"):
        data.load("shakespeare_roles", folder)
    np.savez(
        folder / "wisdm/wisdm.npz",
        features=np.ones((3, 2)),
        labels=np.ones(3, int),
        users=np.ones(2, int),
    )
    with pytest.raises(ValueError, match=r"shapes \(3, 2\), \(3,\) and \(2,\)"):
        data.load("wisdm", folder)


def test_real_users():
    paths = [REAL / "wisdm/wisdm.npz", REAL / "shakespeare_roles/by_role.json"]
    if not all(path.is_file() for path in paths):
        pytest.skip("no wisdm and shakespeare_roles in $GCJAX_DATA")
    task = tasks.activity_recognition(data_dir=REAL, split=by_user())
    assert_partition(task.shards(0, 30), len(task.labels))
    got = data.load("shakespeare_roles", REAL)
    assert len(got["roles"]) == 1338 and len(set(task.labels)) == 6
    longest = got["roles"][int(np.argmax([len(t) for t in got["train"]]))]
    assert longest == "hamlet/HAMLET"

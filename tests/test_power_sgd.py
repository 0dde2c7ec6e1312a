"""Laws of PowerSGD: against plain NumPy, exactness, ranks that change, bad ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import N, info, trainer
from jax import lax
from jax.sharding import PartitionSpec as P

import gcjax
from gcjax.base import Layout
from gcjax.compressors import low_rank

everything = lambda path, shape: True
# Matrices [48, 32], [45, 16], and one wider than tall, [20, 60].
SHAPES = {"a": (48, 32), "b": (3, 3, 5, 16), "c": (20, 60)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def gradients(seed: int, decay: float = 0.6) -> dict:
    """Spectra that decay, as gradients' do, and differ between workers."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in SHAPES.items():
        n, m = int(np.prod(shape[:-1])), shape[-1]
        scales = decay ** np.arange(min(n, m))
        # Workers share the column space in part, as gradients of one model do.
        u = rng.normal(size=(n, scales.size)) + 0.5 * rng.normal(
            size=(N, n, scales.size)
        )
        g = (u * scales) @ rng.normal(size=(N, scales.size, m))
        out[name] = g.reshape(N, *shape).astype(np.float32)
    return out


class Plain:
    """PowerSGD in NumPy float64, Vogels et al., 2019, Algorithms 1 and 2."""

    def __init__(self, factors, error):
        self.q = {n: np.asarray(q, np.float64) for n, q in factors.items()}
        self.error = {n: 0.0 for n in factors}
        self.aggregate = error == "aggregate"

    def update(self, grads):
        return {name: self.mean(name, g) for name, g in grads.items()}

    def mean(self, name, g):
        m = g.astype(np.float64).reshape(N, -1, g.shape[-1]) + self.error[name]
        p, _ = np.linalg.qr((m @ self.q[name]).mean(0))
        own = m.transpose(0, 2, 1) @ p
        self.q[name] = own.mean(0)
        mean = p @ self.q[name].T
        sent = mean if self.aggregate else p @ own.transpose(0, 2, 1)
        self.error[name] = m - sent
        return mean


@functools.cache
def rank_two(error: str):
    return trainer(gcjax.power_sgd(2, compress=everything, error=error), PARAMS)


LAYOUT = Layout(tuple(SHAPES), tuple(SHAPES.values()), 1)


def factors_of(state) -> dict:
    return dict(zip(SHAPES, state.exchange, strict=True))


def errors_of(state) -> dict:
    layers = jax.vmap(LAYOUT.unflatten)(state.worker.value.error)
    return dict(zip(SHAPES, layers, strict=True))


@pytest.mark.parametrize("error", ["local", "aggregate"])
def test_it_is_the_algorithm_over_twenty_warm_started_steps(error):
    """Means, errors and products agree; bases are free to differ by signs.

    After one step to float32 rounding, 1e-6 of the largest entry with a condition of
    the factors of some 10; later errors carry the roundings of all steps before.
    """
    run = rank_two(error)
    state = run.init(PARAMS)
    plain = Plain(factors_of(state), error)
    for step in range(20):
        g = gradients(step)
        mean, state = run.update(state, g)
        expected, errors = plain.update(g), errors_of(state)
        for name in SHAPES:
            tolerance = 1e-5 if step == 0 else 1e-4
            for found, exact in [
                (mean[name], expected[name]),
                (errors[name], plain.error[name]),
            ]:
                difference = np.asarray(found).reshape(exact.shape) - exact
                assert np.abs(difference).max() <= tolerance * np.abs(exact).max()


def test_both_errors_have_one_mean_and_give_the_same_result():
    """What a worker keeps of itself cancels in the mean."""
    runs = []
    for error in ("local", "aggregate"):
        run = rank_two(error)
        state = run.init(PARAMS)
        for step in range(3):
            mean, state = run.update(state, gradients(step))
        runs.append((mean, state.worker.value.error))
    (mean, local), (other, aggregate) = runs
    for name in SHAPES:  # three steps of float32 rounding
        np.testing.assert_allclose(
            mean[name], other[name], rtol=0, atol=1e-5 * np.abs(mean[name]).max()
        )
    largest = np.abs(local).max()
    np.testing.assert_allclose(
        local.mean(0), aggregate.mean(0), rtol=0, atol=1e-5 * largest
    )
    assert np.abs(local - aggregate).max() > 0.1 * largest


def low_rank_gradients(seed: int) -> dict:
    """Rank 2, with a column space that all workers share."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in SHAPES.items():
        n, m = int(np.prod(shape[:-1])), shape[-1]
        g = rng.normal(size=(n, 2)) @ rng.normal(size=(N, 2, m))
        out[name] = g.reshape(N, *shape).astype(np.float32)
    return out


def test_a_gradient_of_that_rank_is_sent_exactly():
    g = low_rank_gradients(0)
    mean, state = rank_two("local").update(rank_two("local").init(PARAMS), g)
    for name in SHAPES:
        # Rounding, with a mean of 8 workers' rank-2 matrices of condition 10 or so.
        largest = np.abs(g[name]).max()
        np.testing.assert_allclose(
            mean[name], g[name].mean(0), rtol=0, atol=1e-5 * largest
        )
    assert np.abs(state.worker.value.error).max() <= 1e-5 * largest


def test_zero_gradients_are_harmless_and_forgotten():
    """Factors become zero. The next gradient's first rows are sent, then all of it."""
    state = rank_two("local").init(PARAMS)
    zeros = {name: np.zeros((N, *shape), np.float32) for name, shape in SHAPES.items()}
    for _ in range(2):
        mean, state = rank_two("local").update(state, zeros)
        assert all((m == 0).all() for m in mean.values())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.exchange))
    g, received = low_rank_gradients(1), []
    for _ in range(3):
        mean, state = rank_two("local").update(state, g)
        received.append(mean)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((mean, state.worker)))
    for name in SHAPES:
        total = sum(np.asarray(m[name], np.float64) for m in received)
        expected = 3 * g[name].mean(0)
        difference = np.abs(total - expected).max()
        assert difference <= 1e-4 * np.abs(expected).max()


def test_one_layers_zeros_do_not_touch_the_others():
    g = low_rank_gradients(2)
    mean, _ = rank_two("local").update(rank_two("local").init(PARAMS), g)
    part, _ = rank_two("local").update(
        rank_two("local").init(PARAMS), {**g, "a": 0 * g["a"]}
    )
    assert (part["a"] == 0).all()
    np.testing.assert_array_equal(part["b"], mean["b"])
    np.testing.assert_array_equal(part["c"], mean["c"])


def test_the_table_is_the_tail_of_the_singular_values():
    """Float32 eigenvalues are exact to about 1e-6 of the largest."""
    ranks = (1, 2, 4, 8, 16)
    table_of = jax.jit(lambda x: low_rank.tail_energy(LAYOUT, x, ranks))
    for g in (gradients(0), gradients(1, decay=0.95), low_rank_gradients(0)):
        x = np.concatenate([g[name][0].reshape(-1) for name in SHAPES])
        table = np.asarray(table_of(x), np.float64)
        for name, row in zip(SHAPES, table, strict=True):
            matrix = g[name][0].astype(np.float64)
            matrix = matrix.reshape(-1, matrix.shape[-1])
            energy = np.linalg.svd(matrix, compute_uv=False) ** 2
            exact = [energy[r:].sum() for r in ranks]
            np.testing.assert_allclose(row, exact, rtol=1e-4, atol=2e-6 * energy.sum())
        assert (np.diff(table, axis=1) <= 0).all()


# --- Ranks that change, and ranks that cannot be. ------------------------------------


def test_ranks_follow_the_spectra_and_unused_columns_keep_their_values():
    """L-GreCo takes columns from a layer of rank one and gives them to another."""
    tx = gcjax.adapt(
        gcjax.power_sgd((1, 3, 6), compress=everything, spacing=2),
        gcjax.lgreco(3),
        every=2,
    )
    run = trainer(tx, PARAMS)
    state, seen = run.init(PARAMS), []
    assert [q.shape for q in state.exchange] == [(32, 6), (16, 6), (60, 6)]
    for step in range(6):
        g = gradients(step, decay=0.9)
        g["a"][:] = np.float32(0.3) * g["a"][:, :, :1] * np.ones(32, np.float32)
        before = state.exchange
        _, state = run.update(state, g)
        ranks = [(1, 3, 6)[v] for v in info(state).levels]
        seen.append(ranks)
        for rank, old, new in zip(ranks, before, state.exchange, strict=True):
            np.testing.assert_array_equal(new[:, rank:], old[:, rank:])
            assert (new[:, 0] != old[:, 0]).any()
    assert seen[:2] == [[3, 3, 3]] * 2
    assert seen[-1][0] == 1 and max(seen[-1]) > 3


def test_columns_come_back_when_the_rank_grows_again():
    tx = gcjax.power_sgd((1, 4), compress=everything, level=4)
    run = trainer(tx, PARAMS)
    at = lambda state, v: state._replace(levels=jnp.full(3, v, jnp.int32))
    _, state = run.update(run.init(PARAMS), gradients(0))
    four = state.exchange
    _, state = run.update(at(state, 0), gradients(1))
    for old, new in zip(four, state.exchange, strict=True):
        np.testing.assert_array_equal(new[:, 1:], old[:, 1:])
    # At rank 4 it starts from all four columns, as the algorithm does from these.
    plain = Plain(factors_of(state), "local")
    plain.error = {
        n: np.asarray(e, np.float64).reshape(N, -1, e.shape[-1])
        for n, e in errors_of(state).items()
    }
    mean, _ = run.update(at(state, 1), gradients(2))
    for name, exact in plain.update(gradients(2)).items():
        difference = np.asarray(mean[name]).reshape(exact.shape) - exact
        # Float32 rounding times the condition of four columns, two orders below.
        assert np.abs(difference).max() <= 1e-4 * np.abs(exact).max()


def test_ranks_that_do_not_make_a_layer_smaller_are_masked():
    params = {
        "tall": jnp.zeros((3000, 2)),  # rank 1 only: 2 * 3002 > 6000
        "square": jnp.zeros((64, 64)),
        "vector": jnp.zeros((500, 1)),  # none: it travels uncompressed
    }
    tx = gcjax.power_sgd((1, 2, 4), compress=everything, level=4)
    layout = tx.layout(params)
    assert layout.paths == ("square", "tall")
    np.testing.assert_array_equal(
        tx.exchange.admits(layout), [[True, True, True], [True, False, False]]
    )
    run = trainer(tx, params)
    state = run.init(params)
    assert state.levels.tolist() == [2, 0]
    assert [q.shape for q in state.exchange] == [(64, 4), (2, 1)]
    rng = np.random.default_rng(0)
    g = {
        n: rng.normal(size=(N, *p.shape)).astype(np.float32) for n, p in params.items()
    }
    mean, state = run.update(state, g)
    rank = {n: np.linalg.matrix_rank(mean[n], rtol=1e-5) for n in ("square", "tall")}
    assert rank == {"square": 4, "tall": 1}
    np.testing.assert_allclose(mean["vector"], g["vector"].mean(0), rtol=0, atol=1e-6)
    # Both factors of both layers, the vector, and the flag of finite steps.
    assert int(info(state).words.reduced) == 4 * 128 + 3002 + 500 + 1


@pytest.mark.parametrize(
    ("shape", "ranks", "expected"),
    [
        ((64, 64), (1, 31, 32), [True, True, False]),  # 32 * 128 = 64 * 64
        ((3, 3, 8, 16), (10, 14, 16), [True, False, False]),  # [72, 16]
        ((5, 1), (1, 2), [False, False]),
        ((7,), (1,), [False]),
        ((), (1,), [False]),
    ],
)
def test_admitted_ranks_exist_and_send_less(shape, ranks, expected):
    assert low_rank.admits(shape, ranks).tolist() == expected


def test_words_are_both_factors():
    words = gcjax.power_sgd((1, 2, 4)).exchange.words(LAYOUT)
    np.testing.assert_array_equal(words, np.outer([80, 61, 80], [1, 2, 4]))


# --- On devices. ---------------------------------------------------------------------


def test_every_device_computes_the_same_factors(mesh):
    """Each decomposes for itself what all received: bit for bit the same."""
    tx = gcjax.power_sgd(2, compress=everything)

    def steps(gs):
        def step(state, g):
            mean, state = tx.update(g, state)
            return state, None

        state, _ = lax.scan(step, tx.init(PARAMS), jax.tree.map(lambda g: g[0], gs))
        return jax.tree.map(lambda q: q[None], state.exchange)

    every_step = [gradients(step) for step in range(4)]
    gs = {n: np.stack([g[n] for g in every_step], axis=1) for n in SHAPES}
    run = jax.shard_map(
        steps,
        mesh=mesh,
        in_specs=P("workers"),
        out_specs=P("workers"),
        check_vma=False,  # else one copy comes out, and nothing is left to compare
    )
    for factor in jax.jit(run)(gs):
        assert factor.shape[0] == N and np.isfinite(factor).all()
        assert (factor == factor[:1]).all()

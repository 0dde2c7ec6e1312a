"""The parameter server: who sends how much, and what all make of it."""

import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import info, slow, tree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gcjax
from gcjax import base
from gcjax.compressors import sparsify
from gcjax.selectors import workers as rules

SHARES = np.array([0.5, 0.3, 0.15, 0.05])
COUNT = len(SHARES)
PARAMS = jax.tree.map(jnp.zeros_like, tree())
SIZE = sum(x.size for x in jax.tree.leaves(PARAMS))

ALLOCATIONS = {
    "ratios": lambda: gcjax.ratios(rules.dagc_r(SHARES, 0.02)),
    "ratios of layers": lambda: gcjax.ratios([0.05, 0.02, 0.01, 0.0], per_layer=True),
    "thresholds": lambda: gcjax.thresholds(rules.dagc_a(SHARES, 2.0), max_ratio=0.2),
    "steered": lambda: gcjax.steered(SHARES, 0.02),
    "resolved": lambda: gcjax.resolved(psi_rule, COUNT, every=2),
    "switched": lambda: gcjax.switched(rules.accordion(0.005, 0.02), COUNT),
    "pairs": lambda: gcjax.pairs(
        gcjax.lgreco(0.01), SHARES, (0.005, 0.01, 0.02), every=2
    ),
}


def psi_rule(zeta):
    return rules.dagc_r(jnp.asarray(SHARES), 0.02, criterion="psi", zeta=zeta)


class Stepper(NamedTuple):
    init: Any
    update: Any  # (state, grads [any, ...]) -> (mean, state)


def stepper(tx, positions: int, on_devices: bool = False) -> Stepper:
    mesh = None
    if on_devices:
        devices = jax.devices()[:positions]
        mesh = jax.make_mesh(
            (positions,), ("workers",), (AxisType.Auto,), devices=devices
        )
    specs = gcjax.state_specs(jax.eval_shape(tx.init, PARAMS))
    across = dict(num_workers=positions, mesh=mesh, check_vma=not on_devices)
    over = functools.partial(gcjax.over_workers, **across)
    step = over(lambda s, g: tx.update(g, s), (specs, P("workers")), (P(), specs))
    return Stepper(jax.jit(over(tx.init, (P(),), specs)), jax.jit(step))


def gradients(step: int, positions: int = COUNT):
    """The same ones for workers, whatever comes after them."""
    grads = tree(seed=step, workers=5)
    return jax.tree.map(lambda x: x[:positions], grads)


def flat(grads) -> np.ndarray:
    """[n, D], without padding."""
    return np.stack(
        [
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(one)])
            for one in (jax.tree.map(lambda x, i=i: x[i], grads) for i in range(COUNT))
        ]
    )


def errors_of(tx, state) -> np.ndarray:
    """[n, D], without padding."""
    layout = tx.layout(PARAMS)
    errors = np.asarray(state.worker.value.error)[:COUNT]
    return np.stack(
        [np.concatenate([np.ravel(x) for x in layout.unflatten(e)]) for e in errors]
    )


def run(tx, steps: int, on_devices: bool = False, positions: int = COUNT):
    """Yields (gradients [n, D], errors before, errors after, mean [D], state)."""
    one = stepper(tx, positions, on_devices)
    state = one.init(PARAMS)
    for step in range(steps):
        grads, before = gradients(step, positions), errors_of(tx, state)
        mean, state = one.update(state, grads)
        mean = np.concatenate([np.ravel(x) for x in jax.tree.leaves(mean)])
        yield flat(grads), before, errors_of(tx, state), mean, state


@pytest.mark.parametrize(
    ("name", "participants"),
    [
        slow(name, count)
        if count and name not in ("ratios", "thresholds")
        else (name, count)
        for name, count in itertools.product(ALLOCATIONS, (None, 2))
    ],
)
def test_what_is_sent_and_the_new_error_are_what_entered(name, participants):
    tx = gcjax.parameter_server(ALLOCATIONS[name](), SHARES, participants=participants)
    sent_by_someone = 0
    for grads, before, after, mean, state in run(tx, 5):
        x = before + grads
        sent = after == 0  # an entry goes as a whole or stays as a whole
        np.testing.assert_allclose(np.where(sent, x, after), x, rtol=1e-6)
        took_part = sent.any(1)
        weights = SHARES
        if participants:
            assert took_part.sum() <= participants
            words = np.asarray(info(state).words.uploaded)
            weights = np.where(words > 1, SHARES, 0)
            if not weights.any():
                continue
            # One that was drawn may have had nothing to send, or no right to.
            lost = mean - (weights / weights.sum()) @ np.where(sent, x, 0)
            if np.sum(words > 1) < participants:
                continue
            np.testing.assert_allclose(lost, 0, atol=1e-5)
        else:
            want = weights @ np.where(sent, x, 0)
            np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-6)
        sent_by_someone += sent.sum()
    assert sent_by_someone > 0


def test_a_table_says_who_takes_part_and_absent_workers_lose_nothing():
    table = np.array([[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    tx = gcjax.parameter_server(ALLOCATIONS["ratios"](), SHARES, participants=table)
    for step, (grads, before, after, mean, _) in enumerate(run(tx, 6)):
        present = table[step % 3]
        x = before + grads
        sent = np.where(after == 0, x, 0)
        np.testing.assert_array_equal(sent[~present], 0)
        np.testing.assert_allclose(after + sent, x, rtol=1e-6)
        assert (np.any(sent, axis=1) == present).all()
        part = SHARES * present / max((SHARES * present).sum(), 1e-30)
        np.testing.assert_allclose(mean, part @ sent, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, to",
    [
        ("ratios", "server"),
        ("ratios", "all"),
        slow("thresholds", "server"),
        slow("pairs", "server"),
    ],
)
def test_devices_send_what_simulated_workers_count(name, to):
    """Sizes of every upload, decoded means and errors; and the compiled program's."""
    tx = gcjax.parameter_server(ALLOCATIONS[name](), SHARES, to=to)
    positions = COUNT + (to == "server")
    simulated = run(tx, 3)
    for a, b in zip(simulated, run(tx, 3, True, positions), strict=True):
        np.testing.assert_allclose(a[2], b[2], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(a[3], b[3], rtol=1e-6, atol=1e-7)
        for x, y in zip(info(a[4]).words, info(b[4]).words, strict=True):
            np.testing.assert_array_equal(x, y)
    if name == "pairs":  # the same messages, and many more lengths to compile
        return
    one = stepper(tx, positions, on_devices=True)
    report = gcjax.wire_report(one.update, one.init(PARAMS), gradients(0, positions))
    assert not report.mismatches, str(report)
    if name == "ratios":
        each = np.asarray(info(b[4]).words.uploaded) // (1 if to == "server" else 3)
        for i, words in enumerate(each):
            uploads = [r for r in report.rows if r.name.startswith(f"from_{i}_")]
            assert {4 * int(words)} == {r.declared_bytes for r in uploads}


@pytest.mark.parametrize(
    "options",
    [
        dict(download=gcjax.top_k(0.05)),
        slow(dict(download=gcjax.cast())),
        slow(dict(opwa=(2.0, 1))),
        dict(participants=2),
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_are_the_same_over_devices(options):
    tx = gcjax.parameter_server(ALLOCATIONS["ratios"](), SHARES, **options)
    for a, b in zip(run(tx, 3), run(tx, 3, True, COUNT + 1), strict=True):
        np.testing.assert_allclose(a[2], b[2], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(a[3], b[3], rtol=1e-6, atol=1e-7)


def test_a_compressed_download_keeps_what_it_leaves_out():
    """All means, and the server's error at last, add up to all uploads."""
    tx = gcjax.parameter_server(
        gcjax.ratios([1.0] * COUNT), SHARES, download=gcjax.top_k(0.1)
    )
    total = want = 0
    steps = list(run(tx, 6))
    for grads, _, _, mean, _ in steps:
        total, want = total + mean, want + SHARES @ grads
    state = steps[-1][-1]
    layout, error = tx.layout(PARAMS), state.exchange[3]
    error = np.concatenate([np.ravel(x) for x in layout.unflatten(error)])
    np.testing.assert_allclose(total + error, want, atol=1e-4)
    assert np.mean(error != 0) > 0.5
    assert int(info(state).words.downloaded) < SIZE / 4


def test_opwa_enlarges_what_few_sent():
    tx = gcjax.parameter_server(gcjax.ratios([0.3] * COUNT), SHARES, opwa=(3.0, 1))
    (_, _, after, mean, _), *_ = run(tx, 1)
    (grads, *_), *_ = run(tx, 1)
    sent = after == 0
    want = SHARES @ np.where(sent, grads, 0) * np.where(sent.sum(0) == 1, 3, 1)
    np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-6)


def test_coefficients_replace_the_weights():
    other = [1, 1, 1, 5]
    tx = gcjax.parameter_server(gcjax.ratios([1.0] * COUNT), SHARES, coefficients=other)
    (grads, _, _, mean, _), *_ = run(tx, 1)
    np.testing.assert_allclose(mean, np.array(other) / 8 @ grads, rtol=1e-5, atol=1e-6)


def test_a_worker_without_data_sends_nothing_and_ratios_are_kept_exactly():
    p = np.array([0.6, 0.4, 0.0, 0.0])
    tx = gcjax.parameter_server(gcjax.ratios(rules.dagc_r(p, 0.01)), p)
    for *_, after, _, state in run(tx, 2):
        sent = (after == 0).sum(1)
        assert sent.sum() == round(2 * 0.01 * SIZE)
        assert not sent[2:].any()
        # The flag of finite gradients is one word.
        np.testing.assert_array_equal(info(state).words.uploaded[2:], 1)


def test_thresholds_wait_beyond_their_room_and_never_send_at_infinity():
    tx = gcjax.parameter_server(
        gcjax.thresholds([1.0, 4.0, np.inf, 1.0], max_ratio=0.05), SHARES
    )
    for grads, before, after, _, _ in run(tx, 3):
        sent, x = after == 0, np.abs(before + grads)
        room = int(0.05 * SIZE)
        assert sent[0].sum() == room < (x[0] >= 1).sum()
        assert (x[0][sent[0]] >= 1).all()
        np.testing.assert_array_equal(sent[1], x[1] >= 4)
        assert not sent[2].any()


@pytest.mark.parametrize("exponent", [0.0, -0.5, -2 / 3, -1.0])
def test_steered_reaches_its_traffic_whatever_the_exponent(exponent):
    tx = gcjax.parameter_server(gcjax.steered(SHARES, 0.02, exponent=exponent), SHARES)
    sent = [(after == 0).sum() for *_, after, _, _ in run(tx, 60)]
    assert np.mean(sent[20:]) == pytest.approx(0.02 * COUNT * SIZE, rel=0.1)


def test_steered_by_the_inverse_weight_keeps_the_largest_weighted_entries():
    tx = gcjax.parameter_server(gcjax.steered(SHARES, 0.02), SHARES)
    _, (grads, before, after, _, _) = run(tx, 2)
    weighted = SHARES[:, None] * np.abs(before + grads)
    sent = after == 0
    assert 0 < sent.sum() < sent.size
    assert weighted[sent].min() >= weighted[~sent].max()


def test_resolved_follows_the_gradients_norms():
    tx = gcjax.parameter_server(ALLOCATIONS["resolved"](), SHARES)
    one = stepper(tx, COUNT)
    state, scale = one.init(PARAMS), jnp.array([1.0, 1.0, 1.0, 30.0])
    for step in range(4):
        grads = jax.tree.map(
            lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 1)), gradients(step)
        )
        _, state = one.update(state, grads)
    granted = np.asarray(state.exchange[1][2])
    want = rules.dagc_r(SHARES, 0.02, criterion="psi", zeta=scale)
    np.testing.assert_allclose(granted / granted.sum(), want / want.sum(), rtol=0.02)
    assert granted.sum() == round(COUNT * 0.02 * SIZE)


def test_switched_sends_much_while_a_workers_norm_changes():
    made = gcjax.switched(rules.accordion(0.01, 0.05), 2)
    layout = base.Layout(("a",), ((2048,),), sparsify.ROW)
    state, seen = made.init(layout), []
    for norms in ([1.0, 1.0], [1.1, 3.0], [1.2, 3.0]):
        seen.append(np.asarray(made.decide(layout, state))[:, 0].tolist())
        reports = jnp.array(norms)[:, None]
        state = made.update(layout, state, None, reports, True)
    seen.append(np.asarray(made.decide(layout, state))[:, 0].tolist())
    assert seen == [[102, 102], [102, 102], [20, 102], [20, 20]]


def test_pairs_of_one_worker_are_lgrecos_choice():
    selector = gcjax.lgreco(0.01)
    made = gcjax.pairs(selector, [7.0], every=1)
    layout = base.Layout(("a", "b"), ((64, 64), (100, 50)), sparsify.ROW)
    x = layout.flatten(
        [
            tree()["b"]["kernel"].reshape(-1)[:1] * jnp.ones((64, 64)),
            jnp.exp(jax.random.normal(jax.random.key(0), (100, 50)) * 3),
        ]
    )
    energy = functools.partial(sparsify.tail_energy, layout)
    table = jax.jit(energy, static_argnums=1)(x, sparsify.DENSITIES)
    words = sparsify.indexed_words(layout, sparsify.counts(layout, sparsify.DENSITIES))
    default = sparsify.DENSITIES.index(0.01)
    problem = base.Problem(
        table, words[0], jnp.full((2,), default, jnp.int32), [], (), layout.sizes
    )
    want, _ = jax.jit(lambda: selector.update(problem, ()))()
    report = jax.jit(functools.partial(made.report, layout))(x)[None]
    choose = jax.jit(functools.partial(made.update, layout))
    levels, _ = choose(made.init(layout), None, report, True)
    np.testing.assert_array_equal(levels, want)
    assert len({*np.asarray(levels).tolist()}) > 1


def test_pairs_of_one_layer_are_psis_choice():
    """With errors (zeta / density)^2 the best densities go as (p zeta)^(2/3)."""
    p, zeta = np.array([0.5, 0.25, 0.15, 0.1]), np.array([1.0, 3.0, 1.0, 2.0])
    ladder = tuple(np.geomspace(0.002, 0.2, 400).tolist())
    default = ladder[200]
    made = gcjax.pairs(gcjax.lgreco(default, error="squared"), p, ladder, every=1)
    layout = base.Layout(("a",), ((1 << 20,),), sparsify.ROW)
    reports = (zeta[:, None] / np.array(ladder)) ** 2
    levels, _ = made.update(
        layout, made.init(layout), None, jnp.asarray(reports, jnp.float32), True
    )
    chosen = np.array(ladder)[np.asarray(levels)]
    want = rules.dagc_r(p, chosen.mean(), criterion="psi", zeta=zeta)
    np.testing.assert_allclose(chosen, want, rtol=0.03)
    assert chosen.mean() < default


def test_a_step_that_is_not_finite_changes_nothing():
    tx = gcjax.parameter_server(ALLOCATIONS["resolved"](), SHARES)
    one = stepper(tx, COUNT)
    _, state = one.update(one.init(PARAMS), gradients(0))
    bad = jax.tree.map(lambda x: x.at[2].set(jnp.nan), gradients(1))
    mean, after = one.update(state, bad)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(mean))
    assert int(info(after).skipped) == 1
    for old, new in zip(
        jax.tree.leaves((state.worker, state.exchange)),
        jax.tree.leaves((after.worker, after.exchange)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gcjax.ratios([0.1, 1.2]), "ratios must be one number per worker"),
        (lambda: gcjax.thresholds([0.0]), "thresholds must be"),
        (lambda: gcjax.thresholds([1.0], max_ratio=2), "max_ratio must be in"),
        (lambda: gcjax.steered([1.0], 0.0), "ratio must be in"),
        (lambda: gcjax.steered([0.0], 0.1), "weights must not all be zero"),
        (lambda: gcjax.resolved(psi_rule, 4, every=0), "every must be >= 1"),
        (
            lambda: gcjax.switched(rules.accordion(0.1, 0.2), 2, max_ratio=2.0),
            "max_ratio must be in",
        ),
        (lambda: gcjax.pairs(gcjax.lgreco(0.33), [1.0]), "not on the ladder"),
        (lambda: gcjax.pairs(gcjax.lgreco(0.001), [1.0]), "below the default, 0.001"),
        (lambda: server(weights=[1, np.nan, 1, 1]), "weights must be one number"),
        (lambda: server(weights=[1, 1]), "do not go together"),
        (lambda: server(to="peers"), "'server' or 'all'"),
        (lambda: server(participants=5), "participants must be a number in 1..4"),
        (lambda: server(participants=[[True] * 3]), "bool[rounds, 4]"),
        (lambda: server(participants=[[1, 1, 0, 1]]), "bool[rounds, 4]"),
        (lambda: server(opwa=(0.0, 1)), "opwa must be"),
        (lambda: server(download=gcjax.qsgd()), "compressor of one level"),
        (
            lambda: gcjax.adapt(server(), gcjax.lgreco("ratios")),
            "allocates by itself",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


def server(weights=SHARES, **options):
    return gcjax.parameter_server(ALLOCATIONS["ratios"](), weights, **options)


def test_an_axis_without_room_for_the_server_is_named():
    one = stepper(server(), COUNT, on_devices=True)
    with pytest.raises(ValueError, match="4 workers and the server take 5 positions"):
        one.update(one.init(PARAMS), gradients(0))

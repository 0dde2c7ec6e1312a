"""The cost model: by hand, on measured codecs, and as the cost of L-GreCo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gcjax
from configs import quickstart
from gcjax import experiment, network, results
from gcjax.base import Problem, Words
from gcjax.network import Codec, Link, measure, survey

PARAMS = {"w": jnp.ones((32, 40)), "b": jnp.ones((40,))}
PLAIN = Link(1e6, 0.01, overhead=1.0)  # 1 Mbit/s


def test_cost_formulas_by_hand():
    # 1000 bytes, 4 workers, 8 ms for 1000 bytes sent.
    by_hand = {
        "all-gather": 3 * 0.008 + 3 * 0.01,
        "all-reduce": 1.5 * 0.008 + 6 * 0.01,
        "reduce-scatter": 0.75 * 0.008 + 3 * 0.01,
        "all-to-all": 0.75 * 0.008 + 0.01,
        "collective-permute": 0.008 + 0.01,
    }
    for kind, expected in by_hand.items():
        np.testing.assert_allclose(network.seconds(kind, 1000, 4, PLAIN), expected)
        assert network.seconds(kind, 1000, 1, PLAIN) == 0, "alone nothing is sent"
    with pytest.raises(ValueError, match="all-to-all"):
        network.seconds("broadcast", 1, 2, PLAIN)


def test_bytes_agree_with_the_bits_of_records():
    words = Words(7, 100, 30, 0, uploaded=0, downloaded=0)
    carried = network.carried(words._asdict(), {"reduced": 2})
    assert sorted(carried) == sorted(
        [("all-gather", 28), ("all-reduce", 200)]
        + [("all-reduce", 200)]
        + [("all-to-all", 120)]
    )
    bits = network.sent_bits(Codec(0, 0, carried), 4)
    np.testing.assert_allclose(bits, results.wire_bits(words, 4))


def test_the_slower_direction_and_headers_count():
    uneven = PLAIN._replace(receive_bits_per_s=0.5e6, latency_s=0.0)
    assert network.seconds("collective-permute", 1000, 2, uneven) == 0.016
    framed = uneven._replace(overhead=network.ETHERNET_TCP)
    seconds = network.seconds("collective-permute", 1000, 2, framed)
    np.testing.assert_allclose(seconds, 0.016 * 1514 / 1448)


def test_presets_are_in_order_and_unknown_links_are_refused():
    speeds = [link.bandwidth_bits_per_s for link in network.LINKS.values()]
    assert network.find_link("100mbit").bandwidth_bits_per_s == 1e8
    assert sorted(speeds[:-1], reverse=True) == speeds[:-1]
    with pytest.raises(ValueError, match="100mbit"):
        network.find_link("56k")


def test_break_even_is_where_both_take_equally_long():
    dense = network.dense_bf16(1_000_000)
    own = Codec(0.1, 0.0, (("all-gather", 40_000.0),))
    link = Link(1e9, 1e-4)
    at = network.break_even(own, dense, 4, link)
    assert 1e6 < at < 1e9
    times = lambda rate: [
        network.step_seconds(c, 4, link._replace(bandwidth_bits_per_s=rate))
        for c in (own, dense)
    ]
    np.testing.assert_allclose(*times(at), rtol=1e-9)
    assert times(at / 2)[0] < times(at / 2)[1]
    assert times(at * 2)[0] > times(at * 2)[1]


def test_what_sends_more_or_nothing_saved_does_not_pay():
    dense = network.dense_bf16(1000)
    link = Link(1e9, 0.0)
    more = Codec(0.0, 0.0, (("all-gather", 1e6),))
    assert network.break_even(more, dense, 4, link) == 0
    same = Codec(1e-3, 0.0, dense.collectives)
    assert network.break_even(same, dense, 4, link) == 0
    free = Codec(0.0, 0.0, (("all-reduce", 10.0),))
    assert network.break_even(free, dense, 4, link) == np.inf


def test_comparison_with_measured_steps():
    words = {"gathered": 25_000, "reduced": 0, "scattered": 0}
    record = dict(method="top_k", rate=1e6, num_workers=4, words=words)
    record |= dict(step_seconds=2.0, compute_seconds=0.1, codec_seconds=0.2)
    (row,) = network.compare([record], PLAIN)
    predicted = 0.1 + 0.2 + 3 * 0.8 + 3 * 0.01
    np.testing.assert_allclose(row.predicted_seconds, predicted)
    np.testing.assert_allclose(row.relative_error, predicted / 2 - 1)
    (twice,) = network.compare([record | {"collectives": {"gathered": 2}}], PLAIN)
    np.testing.assert_allclose(twice.predicted_seconds, predicted + 3 * 0.01)


# --- Measured. ------------------------------------------------------------------------

AGGREGATORS = {
    "top_k": lambda: gcjax.compressed_mean(gcjax.top_k(0.05)),
    "power_sgd adaptive": lambda: gcjax.adapt(
        gcjax.power_sgd((1, 2), spacing=2.0), gcjax.lgreco(2), warmup_steps=5
    ),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_codec_counts_what_a_step_sends(name):
    made = AGGREGATORS[name]()
    codec = measure.measure_codec(made, PARAMS, 4, repeats=1)
    assert codec.seconds >= 0 and codec.copy_seconds > 0
    # The same step among four simulated workers.
    made = made.rebuild(warmup_steps=0)
    state = made.init(PARAMS)
    step = jax.vmap(
        lambda g: made.update(g, state)[1].info.words,
        axis_name="workers",
        out_axes=None,
    )
    words = jax.jit(step)(jax.tree.map(lambda x: jnp.stack([x] * 4), PARAMS))
    expected = results.wire_bits(words, 4)
    np.testing.assert_allclose(network.sent_bits(codec, 4), expected)


def test_alone_is_a_worker_among_equals():
    def fn(x):
        lax = jax.lax
        received = lax.all_to_all(x, "workers", 0, 0, tiled=True)
        gathered = lax.all_gather(x[:3], "workers", tiled=True)
        more = lax.cond(
            x[0] > 0, lambda: lax.psum(x[0], "workers"), lambda: jnp.float32(-1)
        )
        mine = lax.psum_scatter(jnp.ones(8), "workers", tiled=True)
        return received.shape, gathered, more, lax.pmax(x, "workers"), mine

    for x in (jnp.arange(8.0), jnp.arange(8.0) + 1):
        out, traffic = measure.alone(fn, "workers", 4, x)(x)
        same = jnp.broadcast_to(x, (4, 8))
        expected = jax.vmap(fn, axis_name="workers", out_axes=0)(same)[1:]
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b[0]), out[1:], expected
        )
        counts = dict(zip(measure.KINDS, traffic.tolist(), strict=True))
        assert counts["all-to-all"] == [1, 8] and counts["all-gather"] == [1, 3]
        assert counts["all-reduce"] == ([2, 9] if x[0] > 0 else [1, 8])
        assert counts["reduce-scatter"] == [1, 8]


def test_survey_says_what_does_not_pay():
    dense = network.dense_bf16(1_000_000)
    codecs = {
        "dense bf16": dense._replace(copy_seconds=1e-3),
        "dense f32": Codec(1e-3, 1e-3, (("all-reduce", 4e6),)),
        "slow codec": Codec(1.0, 1e-3, (("all-gather", 1e3),)),
        "good": Codec(1e-3, 1e-3, (("all-gather", 1e3),)),
    }
    links = {name: network.LINKS[name] for name in ("nvlink", "10mbit")}
    head, bf16, f32, slow, good = survey.table(codecs, 4, links, 0.1).splitlines()
    assert "nvlink ms" in head and "beats dense f32 below" in head
    assert "does not pay" in f32 and "(" not in bf16
    assert slow.count("(") == 1 and "Mbit/s" in slow, "pays on the slow link only"
    assert good.split()[3] == "1.0", "copies"
    assert set(survey.BASELINES) <= set(survey.FAMILIES)
    layouts = [make().layout(PARAMS) for make in survey.FAMILIES.values()]
    assert all(layout.num_layers for layout in layouts)


def test_a_survey_has_the_methods_of_a_config():
    config = quickstart.get_config()
    task = experiment.build_task(config)
    made = survey.aggregators(config, task)
    own = [results.label(config, m) for m in config.methods if m != "dense"]
    assert list(made) == [*survey.FAMILIES, *own] and own
    config.aggregator = "parameter_server()"
    config.methods = ("uniform(0.01)",)
    with pytest.raises(ValueError, match="parameter_server.*equal workers"):
        survey.aggregators(config, task)


# --- L-GreCo in seconds. --------------------------------------------------------------

SIZES = np.array([4096, 16384, 1024, 8192])
# No two choices of levels are equally long.
WORDS = (
    SIZES[:, None] * np.array([2, 4.1, 8.3, 15.7]) // 100
    + np.arange(16).reshape(4, 4) ** 2
)
WORDS = WORDS.astype(np.int64)
CAPACITIES = [sorted({int(w) for w in WORDS.sum(0)})]
DEFAULT = np.array([1, 1, 1, 1])
KINDS = ("all-gather",) * 4


def errors(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(
        SIZES[:, None] * np.sort(rng.uniform(0.01, 1, (4, 4)))[:, ::-1], jnp.float32
    )


def chosen(selector, errors, words, kinds=KINDS):
    default = jnp.asarray(DEFAULT, jnp.int32)
    levels, _ = selector.update(
        Problem(errors, words, default, CAPACITIES, kinds, SIZES), ()
    )
    return np.asarray(levels)


def with_dense(errors):
    """One more level: uncompressed."""
    more = jnp.concatenate([errors, jnp.zeros((4, 1))], axis=1)
    words = np.concatenate([WORDS, SIZES[:, None]], axis=1)
    return more, words, (*KINDS, "dense")


@pytest.mark.parametrize("seed", range(3))
def test_on_a_slow_link_seconds_are_words(seed):
    cost = network.layer_seconds("10mbit", 4, 1e-9)
    plain = chosen(gcjax.lgreco(2), errors(seed), WORDS)
    timed = gcjax.lgreco(2, cost=cost)
    np.testing.assert_array_equal(chosen(timed, errors(seed), WORDS), plain)
    np.testing.assert_array_equal(chosen(timed, *with_dense(errors(seed))), plain)
    assert (plain != DEFAULT).any(), "the case selects nothing"


def test_on_a_fast_link_nothing_is_compressed():
    timed = gcjax.lgreco(2, cost=network.layer_seconds("100gbit", 4, 1e-9))
    assert chosen(timed, *with_dense(errors(0))).tolist() == [4] * 4


def test_latency_alone_can_decide_for_dense():
    tables = with_dense(errors(0))
    for latency, dense in ((1e-6, False), (1.0, True)):
        cost = network.layer_seconds(Link(1e7, latency), 4)
        levels = chosen(gcjax.lgreco(2, cost=cost), *tables)
        assert (levels == 4).all() == dense


@pytest.mark.parametrize("rate", [1e7, 1e8, 1e9, 2e9, 4e9, 1e10, 1e11])
@pytest.mark.parametrize("seed", range(2))
def test_never_slower_than_uniform(rate, seed):
    tables, words, kinds = with_dense(errors(seed))
    cost = network.layer_seconds(Link(rate, 1e-5), 4, 3e-9)
    levels = chosen(gcjax.lgreco(2, cost=cost), tables, words, kinds)
    rows = np.arange(4)

    def total(levels):
        # A message is as long as its capacity: a ladder has uniform's exactly.
        used = words[rows, levels][levels < 4].sum()
        capacity = next(c for c in [0, *CAPACITIES[0]] if c >= used)
        table = cost(words, SIZES, kinds)[rows, levels].sum()
        padding = cost(np.array([[capacity - used]]), np.zeros(1), KINDS[:1]).item()
        return table + padding + (cost.once("all-gather") if capacity else 0)

    assert total(levels) <= total(DEFAULT) * (1 + 1e-5)
    at = lambda levels: np.sqrt(np.asarray(tables))[rows, levels].sum()
    assert at(levels) <= at(DEFAULT) * (1 + 1e-5)


def test_layers_may_differ_in_whether_they_pay():
    # The codec costs by the element: where few words say all, dense never pays, and
    # where a layer needs them all it pays at once.
    tables, words, kinds = with_dense(errors(0))
    words = words.copy()
    words[2, :4] = 3000
    cost = network.layer_seconds(Link(1e7, 0.0), 4)
    levels = chosen(gcjax.lgreco(2, cost=cost), tables, words, kinds)
    assert levels[2] == 4 and (np.delete(levels, 2) < 4).all()


def test_bad_costs_are_refused():
    with pytest.raises(ValueError, match="num_workers"):
        network.layer_seconds("1gbit", 1)
    with pytest.raises(ValueError, match="link must be"):
        network.layer_seconds("1bit", 4)
    with pytest.raises(ValueError, match="per_element"):
        network.layer_seconds("1gbit", 4, -1.0)

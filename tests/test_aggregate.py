"""Laws of aggregators: exactness, bits, skipped steps, optax wrappers, bad input."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import N, info, slow, trainer, tree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gcjax


def adaptive_top_k(densities=(0.003, 0.01, 0.03), default=0.01, spacing=2.0, **options):
    """A short ladder with few lengths, which compiles quickly."""
    return gcjax.adapt(
        gcjax.compressed_mean(gcjax.top_k(densities), spacing=spacing, **options),
        gcjax.lgreco(default, solver="dp"),
        every=2,
    )


def grads(step: int = 0, scale: float = 1.0):
    return tree(scale, seed=step, workers=N)


def identical(step: int = 0):
    return jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), grads(step))


def test_identity_is_the_plain_mean():
    run = trainer(gcjax.compressed_mean(gcjax.identity()), tree())
    mean, _ = run.update(run.init(tree()), grads())
    expected = jax.tree.map(lambda g: jnp.mean(g, 0), grads())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), mean, expected
    )


def test_identical_workers_give_one_workers_result():
    """The mean of N equal messages is the message, so N plays no part."""
    make = lambda: gcjax.compressed_mean(gcjax.top_k(0.05))
    many = trainer(make(), tree())
    mean, _ = many.update(many.init(tree()), identical())
    over = dict(axis_size=1, axis_name="workers")
    one = jax.jit(jax.vmap(make().init, in_axes=None, **over))(tree())
    alone, _ = jax.jit(jax.vmap(make().update, **over))(
        jax.tree.map(lambda g: g[:1], identical()), one
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-6), mean, alone
    )


# --- Bits: what is declared is what the compiled program sends. ----------------------

SIZES = {"f32": 32, "u32": 32, "s32": 32, "bf16": 16, "u16": 16, "u8": 8, "pred": 8}
COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def compiled_words(run, state, batch):
    """Words that one worker puts into each collective of the compiled program."""
    text = run.update.lower(state, batch).compile().as_text()
    found = {
        "all-gather": [],
        "all-reduce": [],
        "all-to-all": [],
        "collective-permute": [],
    }
    for shapes, kind in COLLECTIVE.findall(text):
        bits = 0
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = int(np.prod([int(d) for d in dims.split(",") if d]))
            bits += SIZES[dtype] * count
        found[kind].append(bits // 32 // (N if kind == "all-gather" else 1))
    return found


FIXED = {
    "identity": lambda: gcjax.compressed_mean(gcjax.identity()),
    "cast": lambda: gcjax.compressed_mean(gcjax.cast()),
    "top_k": lambda: gcjax.compressed_mean(gcjax.top_k(0.05)),
    "random_k": lambda: gcjax.compressed_mean(gcjax.random_k(0.05)),
    "threshold": lambda: gcjax.compressed_mean(gcjax.threshold(2.0, 0.05)),
    "qsgd 3": lambda: gcjax.compressed_mean(gcjax.qsgd(3)),
    "qsgd scattered": lambda: gcjax.compressed_mean(
        gcjax.qsgd(4, 256), collective="reduce_scatter"
    ),
    "cast ring": lambda: gcjax.compressed_mean(gcjax.cast(), collective="ring"),
    "cast scattered": lambda: gcjax.compressed_mean(
        gcjax.cast(), collective="reduce_scatter"
    ),
    "sign": lambda: gcjax.compressed_mean(gcjax.sign()),
    "terngrad": lambda: gcjax.compressed_mean(gcjax.terngrad()),
    "natural": lambda: gcjax.compressed_mean(gcjax.natural()),
    "power_sgd": lambda: gcjax.power_sgd(2),
}


@pytest.mark.parametrize("name", FIXED)
def test_declared_bits_are_the_compiled_collectives(name, mesh):
    run = trainer(FIXED[name](), tree(), mesh)
    state = run.init(tree())
    found = compiled_words(run, state, grads())
    _, state = run.update(state, grads())
    words = info(state).words
    assert int(words.gathered) == sum(found["all-gather"])
    assert int(words.reduced) == sum(found["all-reduce"])
    assert int(words.scattered) == sum(found["all-to-all"])
    assert int(words.permuted) == sum(found["collective-permute"])


def test_declared_bits_of_every_capacity_are_in_the_compiled_program(mesh):
    made = adaptive_top_k((0.001, 0.003, 0.01, 0.03), spacing=1.4)
    run = trainer(made, tree(), mesh)
    state = run.init(tree())
    found = compiled_words(run, state, grads())
    assert len(found["all-gather"]) > 5
    for step in range(8):
        batch = grads(step)
        batch["a"]["kernel"] = batch["a"]["kernel"] ** (1 + step)
        _, state = run.update(state, batch)
        assert int(info(state).words.gathered) in found["all-gather"]


@pytest.mark.parametrize("where", [slow("vmap"), "shard_map"])
def test_one_compilation_over_twenty_selections_with_bytes_that_follow(where, mesh):
    made = adaptive_top_k((0.005, 0.01, 0.02, 0.05, 0.1), default=0.05, spacing=1.4)
    run = trainer(made, tree(), mesh if where == "shard_map" else None)
    state, sent, levels = run.init(tree()), set(), set()
    batch = grads()  # made before the count starts
    events = []
    listen = lambda name, *_, **__: events.append(name)
    _, state = run.update(state, batch)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for step in range(44):
            # Gradients whose sparsity and size change, in one layer after the other.
            name = "ac"[step % 4 // 2]
            power, size = 1 + step * 3 % 5, 3.0 ** (step * 5 % 7 - 3)
            kernel = grads()[name]["kernel"]
            kernel = jnp.sign(kernel) * jnp.abs(kernel) ** jnp.float32(power)
            batch[name]["kernel"] = kernel * jnp.float32(size)
            events.clear()
            _, state = run.update(state, batch)
            compiled = [e for e in events if "backend_compile" in e]
            assert not compiled, "a change of levels compiled again"
            sent.add(int(info(state).words.gathered))
            levels.add(tuple(np.asarray(info(state).levels).tolist()))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert int(info(state).selections) >= 20
    assert len(levels) > 3 and len(sent) > 2


def test_capacities_cost_three_percent_on_average():
    from gcjax import wire

    ladder = wire.capacity_ladder(1000, 100_000, np.array([7777, 65_536]), 1.05)
    assert {1000, 7777, 65_536, 100_000} <= set(ladder)
    needed = np.geomspace(1000, 100_000, 5000).astype(int)
    taken = np.array(ladder)[np.searchsorted(ladder, needed)]
    assert np.mean(taken / needed) - 1 <= 0.03


def test_never_more_words_than_uniform():
    """L-GreCo's length, padding included, stays within the uniform default's."""
    params = tree()
    uniform = trainer(gcjax.compressed_mean(gcjax.top_k(0.01)), params)
    _, state = uniform.update(uniform.init(params), grads())
    limit = int(info(state).words.gathered)
    run = trainer(adaptive_top_k(), params)
    state = run.init(params)
    for step in range(8):
        _, state = run.update(state, grads(step))
        assert int(info(state).words.gathered) <= limit


# --- Steps that are not finite. ------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing():
    """One worker's bad gradient neither moves parameters nor touches any error."""
    run = trainer(adaptive_top_k(momentum=0.9), tree())
    state = run.init(tree())
    for step in range(3):
        _, state = run.update(state, grads(step))
    for value, leaf in itertools.product([np.nan, np.inf], ["bias", "kernel"]):
        bad = grads(3)
        bad["a"][leaf] = bad["a"][leaf].at[5].set(value)
        mean, after = run.update(state, bad)
        assert all((x == 0).all() for x in jax.tree.leaves(mean))
        for name in ("error", "velocity"):
            np.testing.assert_array_equal(
                getattr(after.worker.value, name), getattr(state.worker.value, name)
            )
        assert int(info(after).skipped) == 1
        mean, after = run.update(after, grads(4))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((mean, after)))


def test_report_shows_the_step_to_wrappers_inside():
    """optax.apply_if_finite around the optimizer alone keeps its moments."""
    inside = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 3)
    tx = optax.chain(gcjax.power_sgd(2, nonfinite="report"), inside)
    run = trainer(tx, tree())
    _, state = run.update(run.init(tree()), grads())
    bad = grads(1)
    bad["c"]["scale"] = bad["c"]["scale"].at[0].set(np.nan)
    updates, after = run.update(state, bad)
    assert all((x == 0).all() for x in jax.tree.leaves(updates))
    trace = lambda s: optax.tree.get(s, "trace")
    jax.tree.map(np.testing.assert_array_equal, trace(state), trace(after))
    jax.tree.map(np.testing.assert_array_equal, state[0].exchange, after[0].exchange)


# --- Types, wrappers, mappings. ------------------------------------------------------


def test_errors_stay_float32_and_updates_keep_the_gradients_type():
    half = lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), t)
    run = trainer(adaptive_top_k(), half(tree()))
    mean, state = run.update(run.init(half(tree())), half(grads()))
    assert {x.dtype for x in jax.tree.leaves(mean)} == {jnp.dtype(jnp.bfloat16)}
    assert state.worker.value.error.dtype == jnp.float32


def top():
    return gcjax.compressed_mean(gcjax.top_k(0.05))


WRAPPED = {
    "chain": lambda: optax.chain(top(), optax.sgd(0.1, momentum=0.9)),
    "named_chain": lambda: optax.named_chain(("mean", top()), ("sgd", optax.sgd(0.1))),
    "masked": lambda: optax.masked(top(), {"a": True, "b": True, "c": True}),
    "partition": lambda: optax.partition(
        {"k": top(), "q": gcjax.compressed_mean(gcjax.qsgd(4))},
        {"a": "k", "b": "q", "c": "k"},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(top(), optax.sgd(rate))
    )(rate=0.1),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("where", ["vmap", slow("shard_map")])
def test_inside_optax_wrappers(name, where, mesh):
    run = trainer(WRAPPED[name](), tree(), mesh if where == "shard_map" else None)
    state = run.init(tree())
    updates, after = run.update(state, grads())
    shape = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)
    assert shape(state) == shape(after)
    marked = [s for s in jax.tree.leaves(run.specs) if s == P("workers")]
    assert marked, "no per-worker leaf was found through the wrapper"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_masked_leaves_are_left_alone():
    mask = {"a": True, "b": False, "c": True}
    run = trainer(optax.masked(top(), mask), tree())
    state = run.init(tree())
    assert "b/kernel" not in top().layout({"a": tree()["a"]}).paths
    assert state.inner_state.worker.value.error.shape[0] == N


def test_multi_steps_stays_correct_and_communicates_every_micro_step():
    """optax.MultiSteps around an aggregator: every micro-step exchanges, state kept.

    It calls the inner update at each micro-step and keeps its state only at the last,
    so traffic is k-fold; that is why gcjax.train accumulates first.
    """
    multi = optax.MultiSteps(
        optax.chain(gcjax.compressed_mean(gcjax.identity()), optax.sgd(1.0)), 2
    )
    tx = optax.GradientTransformation(multi.init, multi.update)
    # The accumulator is per worker here, and nothing marks it: map it by hand.
    params = {"w": jnp.zeros((40, 40))}
    g = {"w": jax.random.normal(jax.random.key(0), (2, N, 40, 40))}

    def both(g):
        state = tx.init(params)
        first, state = tx.update({"w": g["w"][0]}, state, params)
        second, state = tx.update({"w": g["w"][1]}, state, params)
        return first, second

    fn = jax.vmap(both, in_axes=1, axis_name="workers")
    with jax.numpy_dtype_promotion("standard"):  # optax needs it here
        first, second = jax.jit(fn)(g)
    assert (first["w"] == 0).all()
    np.testing.assert_allclose(
        second["w"][0], -jnp.mean(g["w"], (0, 1)), rtol=0, atol=1e-6
    )
    with jax.numpy_dtype_promotion("standard"):
        jaxpr = jax.make_jaxpr(both, axis_env=[("workers", N)])({"w": g["w"][:, 0]})
    assert str(jaxpr).count("psum") >= 2  # one at each micro-step


def test_inside_a_users_pmap():
    tx = optax.chain(top(), optax.sgd(0.1))
    params = tree()
    copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (N, *p.shape)), params)
    state = jax.pmap(tx.init, axis_name="workers")(copies)
    update = jax.pmap(tx.update, axis_name="workers")
    updates, state = update(grads(), state)
    run = trainer(tx, params)
    expected, _ = run.update(run.init(params), grads())
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert (x == x[:1]).all(), "replicas differ"
        np.testing.assert_allclose(x[0], y, rtol=0, atol=1e-6)


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"]) ** 2)


@pytest.mark.parametrize("explicit", [False, True])
def test_gradients_already_summed_are_refused_and_local_ones_accepted(explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((N,), ("workers",), axis_types=(kind,))
    tx = gcjax.compressed_mean(gcjax.top_k(0.1))
    params = {"w": jnp.ones((32, 40))}
    specs = gcjax.state_specs(jax.eval_shape(tx.init, params))

    def step(params, x, local):
        at = gcjax.as_local(params) if local else params
        return tx.update(jax.grad(loss)(at, x), tx.init(params))

    x = jnp.ones((N, 4, 32))
    if explicit:
        x = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("workers")))
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, P()))
    run = lambda local: jax.jit(
        jax.shard_map(
            lambda p, x: step(p, x[0], local),
            mesh=mesh,
            in_specs=(P(), P("workers")),
            out_specs=(P(), specs),
        )
    )(params, x)
    run(True)
    with pytest.raises(ValueError, match="gradient w is the same on all workers"):
        run(False)


def test_local_gradients_are_accepted_without_the_check(mesh):
    tx = gcjax.compressed_mean(gcjax.top_k(0.1))
    params = {"w": jnp.ones((32, 40))}

    def step(params, x):
        g = jax.grad(loss)(gcjax.as_local(params), x[0])
        return tx.update(g, tx.init(params))[0]

    x = jax.random.normal(jax.random.key(0), (N, 4, 32))
    checked = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("workers")), out_specs=P()
    )
    unchecked = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("workers")), out_specs=P(), check_vma=False
    )
    a, b = jax.jit(checked)(params, x), jax.jit(unchecked)(params, x)
    np.testing.assert_allclose(a["w"], b["w"], rtol=0, atol=1e-6)


def test_replicas_are_bit_identical_after_every_step(mesh):
    """Parameters that each device computed for itself never drift apart."""
    tx = optax.chain(adaptive_top_k(), optax.sgd(0.1, momentum=0.9))
    params = {"w": jnp.ones((32, 40)) * 0.1, "v": jnp.ones((32, 40))}
    specs = gcjax.state_specs(jax.eval_shape(tx.init, params))

    def step(params, state, x):
        # Parameters come in as each worker's own copy, and go out so.
        own = jax.tree.map(lambda p: p[0], params)
        g = jax.grad(lambda p: loss(p, x[0]) + jnp.sum(p["v"] ** 2))(own)
        updates, state = tx.update(g, state)
        new = optax.apply_updates(own, updates)
        return jax.tree.map(lambda p: p[None], new), state

    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
    fn = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P("workers"), specs, P("workers")),
            out_specs=(P("workers"), specs),
        )
    )
    state = jax.jit(init)(params)
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, (N, *p.shape)), params)
    for i in range(6):
        x = jax.random.normal(jax.random.key(i), (N, 4, 32))
        params, state = fn(params, state, x)
        for p in jax.tree.leaves(params):
            assert (np.asarray(p) == np.asarray(p)[:1]).all()


# --- Bad input. ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: gcjax.compressed_mean(gcjax.top_k(), level=0.5), "not on the ladder"),
        (lambda: gcjax.compressed_mean(gcjax.top_k(), spacing=1.0), "spacing"),
        (lambda: gcjax.compressed_mean(gcjax.top_k(), nonfinite="x"), "nonfinite"),
        (lambda: gcjax.compressed_mean(gcjax.top_k(), momentum=1.0), "momentum"),
        (lambda: gcjax.compressed_mean(gcjax.top_k(), local_clip=0), "local_clip"),
        (lambda: gcjax.power_sgd(0), "rank"),
        (lambda: gcjax.power_sgd(64).init(tree()), "none of the tensors"),
        (lambda: gcjax.power_sgd(2, error="x"), "error must be"),
        (lambda: gcjax.adapt(top(), gcjax.lgreco(0.3)), "not on the ladder"),
        (lambda: gcjax.adapt(top(), gcjax.lgreco(0.05), every=0), "every"),
        (lambda: gcjax.adapt(optax.sgd(0.1), gcjax.lgreco(0.05)), "aggregator"),
        (lambda: gcjax.lgreco(0.01, error="x"), "error must be"),
        (lambda: gcjax.lgreco(0.01, solver="x"), "solver must be"),
        (lambda: gcjax.lgreco(0.01, alpha=0), "alpha"),
        (lambda: gcjax.lgreco(0.01, sample="x"), "sample must be"),
        (lambda: gcjax.lgreco(0.01, snapshot_steps=0), "snapshot_steps"),
        (lambda: top().init({}), "parameter tree is empty"),
        (lambda: gcjax.compressed_mean(gcjax.top_k()).init(tree()), "12 levels"),
        (
            lambda: gcjax.compressed_mean(gcjax.qsgd(1), error_feedback=True).init(
                tree()
            ),
            "not admitted",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make, cause):
    with pytest.raises(ValueError, match=cause) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_only_small_tensors_is_fine():
    params = {"bias": jnp.ones(7), "scale": jnp.ones(())}
    run = trainer(gcjax.adapt(top(), gcjax.lgreco(0.05), every=2), params)
    g = jax.tree.map(lambda x: jnp.broadcast_to(x, (N, *x.shape)), params)
    mean, _ = run.update(run.init(params), g)
    jax.tree.map(np.testing.assert_array_equal, mean, params)


def test_the_rule_decides_what_is_compressed():
    rule = lambda path, shape: path.startswith("c/")
    made = gcjax.compressed_mean(gcjax.top_k(0.05), compress=rule)
    assert made.layout(tree()).paths == ("c/kernel", "c/scale")


# --- Layers that travel uncompressed. -------------------------------------------------


class MiddleIsFree:
    """A cost at which only the second layer is better not compressed."""

    def __call__(self, words, sizes, kinds):
        costs = np.array(words, float)
        for column, kind in enumerate(kinds):
            if kind == "dense":
                costs[:, column] = 1e9
                costs[1, column] = 0
        return costs

    def once(self, kind):
        return 0.0


@pytest.mark.parametrize("where", ["vmap", slow("shard_map")])
def test_a_layer_may_travel_uncompressed(where, mesh):
    aggregator = gcjax.adapt(
        gcjax.compressed_mean(gcjax.top_k((0.003, 0.01, 0.03)), spacing=2.0),
        gcjax.lgreco(0.01, cost=MiddleIsFree()),
        every=2,
    )
    run = trainer(aggregator, tree(), mesh if where == "shard_map" else None)
    state, layout = run.init(tree()), aggregator.layout(tree())
    for step in range(4):
        error = state.worker.value.error
        batch = grads(step)
        mean, state = run.update(state, batch)
    levels, words = np.asarray(info(state).levels), info(state).words
    assert levels[1] == -1 and (levels[[0, 2]] >= 0).all()
    # It is sent as it is, with what was still owed, and leaves no error.
    uncompressed = int(words.reduced)
    assert layout.sizes[1] <= uncompressed <= 1.25 * layout.sizes[1]
    leaves = [x for x in jax.tree.leaves(batch) if x[0].size >= 1024]
    x = jax.vmap(lambda *g: layout.flatten(list(g)))(*leaves) + error
    found = layout.flatten([x for x in jax.tree.leaves(mean) if x.size >= 1024])
    kept = jnp.mean(x - state.worker.value.error, 0)
    np.testing.assert_allclose(found, kept, atol=1e-5)
    middle = layout.unflatten(jnp.mean(x, 0))[1]
    np.testing.assert_allclose(layout.unflatten(found)[1], middle, atol=1e-5)


@pytest.mark.parametrize(
    "compressor",
    [
        gcjax.identity(),
        gcjax.cast(),
        gcjax.sign(),
        slow(gcjax.terngrad()),
        slow(gcjax.natural()),
        gcjax.threshold(0.5),
    ],
    ids=lambda c: c.name,
)
def test_compressors_of_one_level_do_not_add_to_it(compressor):
    """They know no other level at which to leave a layer out."""
    aggregator = gcjax.adapt(
        gcjax.compressed_mean(compressor),
        gcjax.lgreco(compressor.levels[0], cost=MiddleIsFree()),
        every=2,
    )
    run = trainer(aggregator, tree())
    state = run.init(tree())
    for step in range(4):  # at the third one what is owed is sent along
        mean, state = run.update(state, grads(step))
    assert info(state).levels.tolist() == [0, -1, 0]
    exact = jnp.mean(grads(3)["b"]["kernel"], 0)
    np.testing.assert_allclose(mean["b"]["kernel"], exact, atol=1e-6)

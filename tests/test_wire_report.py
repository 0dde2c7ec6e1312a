"""What a compiled step sends is what gcjax says it sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import N, info, trainer
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gcjax
from gcjax import collectives, hlo, results

F32 = jax.ShapeDtypeStruct((N, 64), jnp.float32)
PARAMS = {"a": jnp.ones((32, 33)), "b": jnp.ones((33,)), "c": jnp.ones((40, 32))}

AGGREGATORS = {
    "identity": lambda: gcjax.compressed_mean(gcjax.identity()),
    "cast": lambda: gcjax.compressed_mean(gcjax.cast()),
    "top_k": lambda: gcjax.compressed_mean(gcjax.top_k(0.05)),
    "qsgd": lambda: gcjax.compressed_mean(gcjax.qsgd(4)),
    "power_sgd": lambda: gcjax.power_sgd(2),
    "top_k adaptive": lambda: gcjax.adapt(
        gcjax.compressed_mean(gcjax.top_k((0.01, 0.05)), spacing=1.5),
        gcjax.lgreco(0.05),
        every=2,
        warmup_steps=1,
    ),
}


def step_of(fn, mesh):
    """A step over devices whose workers see their rows, without the leading axis."""
    local = lambda *args: jax.tree.map(jnp.atleast_2d, fn(*(x[0] for x in args)))
    spec = P(mesh.axis_names)
    # Unchecked: what varies over workers is not the matter here.
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    return mapped(local, in_specs=spec, out_specs=spec)


def reduce(x, name):
    return collectives.all_reduce(x, "workers", name)[0]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_compiled_equals_declared_equals_counted(name, mesh):
    run = trainer(AGGREGATORS[name](), PARAMS, mesh)
    grads = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(0), (N, *x.shape)), PARAMS
    )
    state = run.init(PARAMS)
    report = gcjax.wire_report(run.update, state, grads)
    assert not report.mismatches, str(report)
    assert report.rows and all(row.name for row in report.rows)
    assert {row.num_workers for row in report.rows} == {N}
    if "adaptive" in name:
        messages = [r.compiled_bytes for r in report.rows if r.name == "message"]
        assert len(messages) > 2 and messages == sorted(set(messages))
        return
    assert all(row.where == () for row in report.rows)
    assert report.collectives_per_step <= len(report.rows)
    words = info(run.update(state, grads)[1]).words
    declared, compiled, sent = report.totals[()]
    assert 8 * declared == 8 * compiled == results.payload_bits(words)
    np.testing.assert_allclose(8 * sent, results.wire_bits(words, N))
    np.testing.assert_allclose(report.sent_bytes_per_step, sent)


def test_every_capacity_of_a_switch_is_named(mesh):
    ladder = [3, 5, 9]

    def step(x):
        def at_capacity(capacity, x):
            messages, words = collectives.gather(x[:capacity], "workers", "message")
            return messages.sum(), words.gathered

        length = reduce(jnp.sum(x > 0, dtype=jnp.float32), "length")
        return collectives.switch(length.astype(jnp.int32), ladder, at_capacity, x)

    report = gcjax.wire_report(step_of(step, mesh), F32)
    length, *messages = report.rows
    assert not report.mismatches
    assert length.where == () and length.kind == "all-reduce"
    assert [m.declared_bytes for m in messages] == [4 * c for c in ladder]
    assert [m.compiled_bytes for m in messages] == [4 * c for c in ladder]
    assert [m.where for m in messages] == [((0, i, 3),) for i in range(3)]
    assert report.collectives_per_step == 2
    totals = report.totals
    assert totals[()] == (4, 4, 2 * (N - 1) / N * 4)
    assert totals[messages[2].where] == (40, 40, totals[()][2] + (N - 1) * 36)
    assert report.sent_bytes_per_step == totals[messages[2].where][2]
    assert "switch 0 branch 2/3" in str(report)


def test_a_users_own_collective_is_not_declared(mesh):
    step = lambda x: (reduce(x, "mine"), lax.pmax(x[:3], "workers"))
    report = gcjax.wire_report(step_of(step, mesh), F32)
    mine, users = report.rows
    assert not mine.problem and mine.declared_bytes == 256
    assert users.problem == "not declared" and users.declared_bytes is None
    assert users.compiled_bytes == 12 and report.mismatches == (users,)


def test_a_widened_type_is_a_mismatch(mesh):
    step = lambda x: reduce(x.astype(jnp.bfloat16), "half").astype(jnp.float32)
    (row,) = gcjax.wire_report(step_of(step, mesh), F32).rows
    assert row.declared_bytes == 128 and row.compiled_bytes == 256
    assert "f32" in row.problem and "bfloat16" in row.problem


def test_a_wrong_declaration_is_a_mismatch(mesh):
    def step(x):
        with jax.named_scope("gcjax:short:words=7"):
            return lax.psum(x, "workers")

    (row,) = gcjax.wire_report(step_of(step, mesh), F32).rows
    assert row.name == "short" and row.problem.startswith("256 bytes of f32, 28")


def test_combined_collectives_are_told_apart(mesh):
    step = lambda x: [reduce(x[:n] * n, f"part{n}") for n in (5, 7, 64)]
    report = gcjax.wire_report(step_of(step, mesh), F32)
    assert not report.mismatches, str(report)
    assert [r.name for r in report.rows] == ["part5", "part7", "part64"]
    assert len({r.op for r in report.rows}) == 1, "the case combines nothing"
    assert report.collectives_per_step == 1
    assert report.totals[()][:2] == (4 * 76, 4 * 76)


def test_a_collective_that_vanished(mesh):
    def step(x):
        reduce(x, "unused")
        return reduce(x[:2], "used")

    unused, used = gcjax.wire_report(step_of(step, mesh), F32).rows
    assert unused.problem == "not in the compiled program"
    assert unused.compiled_bytes == 0 and not used.problem


def test_loops_and_all_to_all(mesh):
    def step(x):
        turn = lambda x, _: (reduce(jnp.sin(x), "turn"), None)
        x = lax.scan(turn, x, None, length=5)[0]
        return collectives.scatter(x, "workers", "shares")[0]

    report = gcjax.wire_report(jax.jit(step_of(step, mesh), donate_argnums=0), F32)
    turn, shares = report.rows
    assert not report.mismatches
    assert turn.times == 5 and shares.times == 1
    assert shares.kind == "all-to-all" and shares.compiled_bytes == 256
    assert shares.sent_bytes == (N - 1) / N * 256
    assert report.collectives_per_step == 6
    assert report.totals[()][1] == 6 * 256


def test_one_axis_of_two():
    mesh = jax.make_mesh(
        (2, 4), ("replicas", "shards"), axis_types=(AxisType.Auto, AxisType.Auto)
    )
    step = lambda x: collectives.gather(x, "replicas", "message")[0]
    (row,) = gcjax.wire_report(step_of(step, mesh), F32).rows
    assert row.num_workers == 2 and not row.problem
    assert row.compiled_bytes == row.sent_bytes == 256


def test_simulated_workers_send_nothing():
    run = trainer(AGGREGATORS["identity"](), PARAMS)
    state = jax.eval_shape(run.init, PARAMS)
    grads = jax.tree.map(lambda x: jnp.ones((N, *x.shape)), PARAMS)
    with pytest.raises(ValueError, match="simulated by jax.vmap"):
        gcjax.wire_report(run.update, state, grads)


def test_a_step_without_collectives():
    report = gcjax.wire_report(lambda x: 2 * x, F32)
    assert report.rows == () and report.collectives_per_step == 0
    assert "sends nothing" in str(report)


# As GPU and TPU compilers write them: asynchronous, wrapped, grouped.
TEXT = """HloModule jit_step, num_partitions=8

%wrapped (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[16]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

%small (q: f32[4]) -> f32[16] {
  %q = f32[4]{0:T(128)} parameter(0)
  ROOT %ag = f32[16]{0} all-gather(f32[4]{0} %q), replica_groups={{0,1,2,3},{4,5,6,7}}
}

%none (r: f32[4]) -> f32[16] {
  %r = f32[4]{0} parameter(0)
  ROOT %b = f32[16]{0} broadcast(%r), dimensions={}
}

ENTRY %main (x: f32[64], y: bf16[6], z: f32[4], c: pred[]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  %y = bf16[6]{0} parameter(1)
  %z = f32[4]{0} parameter(2)
  %c = pred[] parameter(3)
  %ar = (f32[64]{0}, bf16[6]{0}) all-reduce-start(%x, /*index=1*/%y), \
replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, \
metadata={op_name="jit(f)/cond/branch_1_fun/gcjax:a:words=64/psum"}
  %done = (f32[64]{0}, bf16[6]{0}) all-reduce-done(%ar)
  %rs-start = ((f32[64]{0}), f32[16]{0}) async-start(%x), calls=%wrapped
  %rs-done = f32[16]{0} async-done(%rs-start)
  ROOT %if = f32[16]{0} conditional(%c, %z, %z), true_computation=%small, \
false_computation=%none
}
"""


def test_other_compilers_syntax():
    reduced, scattered, gathered = hlo.compiled(TEXT)
    assert reduced.kind == "all-reduce" and reduced.num_workers == 2
    assert [x.num_bytes for x in reduced.operands] == [256, 12]
    assert reduced.scope == ("a", 64) and reduced.branches == (1,)
    assert scattered.kind == "reduce-scatter" and scattered.num_workers == 4
    assert [x.num_bytes for x in scattered.operands] == [256]
    assert gathered.num_workers == 4 and gathered.where == (("main/if", 1),)
    assert [x.text for x in gathered.operands] == ["f32[4]"]

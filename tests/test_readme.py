"""The README's examples run as they stand there."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import gcjax

README = Path(__file__).resolve().parents[1] / "README.md"


EXAMPLE, SERVER = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_the_servers_example_sends_more_from_larger_workers():
    names = {"gcjax": gcjax, "optax": optax}
    exec(compile(SERVER, str(README), "exec"), names)
    tx, params = names["tx"], {"w": jnp.zeros((64, 64))}
    specs = gcjax.state_specs(jax.eval_shape(tx.init, params))
    over = functools.partial(gcjax.over_workers, num_workers=4)
    state = over(tx.init, (P(),), specs)(params)
    step = over(
        lambda g, s: tx.update(g, s, params), (P("workers"), specs), (P(), specs)
    )
    grads = {"w": jax.random.normal(jax.random.key(0), (4, 64, 64))}
    _, state = jax.jit(step)(grads, state)
    uploads = optax.tree.get(state, "info").words.uploaded.tolist()
    assert sorted(uploads, reverse=True) == uploads and uploads[0] > uploads[-1]


def test_the_example_runs_and_compiles_once(capsys):
    code = EXAMPLE
    # A short ladder compiles quickly; selections within a few steps.
    code = code.replace("top_k()", "top_k((0.01, 0.03))")
    code = code.replace("every=100, warmup_steps=200", "every=1, warmup_steps=1")
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert "levels" in capsys.readouterr().out
    params, state, batch = names["params"], names["state"], names["batch"]
    for _ in range(3):
        params, state = names["step"](params, state, batch)
    assert names["step"]._cache_size() == 1
    info = optax.tree.get(state, "info")
    assert int(info.words.gathered) > 0 and not bool(info.dense)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))

"""The README's example runs as it stands there."""

import re
from pathlib import Path

import jax
import numpy as np
import optax

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_runs_and_compiles_once(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
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

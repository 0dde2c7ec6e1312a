"""Several processes: the same trajectory, faults, and links with a limited rate."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import slow

from configs import quickstart
from gcjax import cluster, results, train

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[1]
METHOD = "lgreco(default=0.02, solver='dp')"
FIELDS = {
    "methods": (METHOD,),
    "aggregator": "compressed_mean(top_k((0.01, 0.02)), spacing=2.0)",
    "steps": 60,
    "every": 5,
    "warmup_steps": 2,
    "batch_size_per_worker": 4,
    "learning_rate": 0.02,
    "eval_every": 20,
    "log_every": 1,
    "checkpoint_every": 10,
    "resume": True,  # so that the same command starts and continues a run
}


# Of launched processes: the tests wait for compilations most of the time.
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
}


def training(workdir, num_workers, **fields):
    """The command of a training run."""
    fields = FIELDS | {"num_workers": num_workers} | fields
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["scripts/train.py", "--config=configs/quickstart.py", *flags] + [
        f"--workdir={workdir}"
    ]


def launched(processes, command, *flags):
    """Starts the launcher."""
    return subprocess.Popen(
        [sys.executable, "scripts/launch.py", f"--processes={processes}", *flags]
        + ["--", *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(launcher, seconds=300):
    """What a launcher printed, and its exit status."""
    with launcher:
        try:
            return launcher.communicate(timeout=seconds)[0], launcher.returncode
        finally:
            launcher.terminate()


def pid_of(launcher, rank):
    """Process number of a rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    for pid in children.read_text().split():
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if f"--process_id={rank}" in words and "--pdeathsig" not in words:
            return int(pid)
    raise AssertionError(f"rank {rank} is not running")


def until(condition, seconds=300):
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def is_running(pid):
    """Whether a process exists and is no zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )
    return False


def simulated(workdir, num_workers, **fields):
    """The same run with simulated workers in this process."""
    config = quickstart.get_config()
    config.update(FIELDS | {"num_workers": num_workers} | fields)
    with jax.numpy_dtype_promotion("standard"):
        return train.train(config, config.methods[0], workdir)


def same_to_rounding(a, b):
    """Two runs' series: same bits and levels, and the same losses but for rounding."""
    for name in ("step", "total_bits", "levels", "levels_step", "eval_step"):
        assert a[name] == b[name], name
    # Two programs round differently, and training enlarges that: about 1e-6 here.
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of a run of two processes that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    output, status = finished(launched(2, training(workdir, 2)))
    assert status == 0, output
    return workdir


def test_processes_give_what_simulation_gives(undisturbed, tmp_path):
    record = json.loads((undisturbed / "record.json").read_text())
    assert record["config"]["mapping"] == "processes"
    expected = simulated(tmp_path, 2)
    same_to_rounding(record["series"], expected["series"])
    assert record["final"]["total_bits"] == expected["final"]["total_bits"]


@pytest.mark.parametrize(
    ("rank", "line"),
    [
        pytest.param(0, 25, id="coordinator"),
        slow(1, 15, id="worker"),
    ],
)
def test_a_killed_rank_is_named_and_the_run_continues(
    undisturbed, tmp_path, rank, line
):
    command = training(tmp_path, 2)
    launcher = launched(2, command)
    until(lambda: len(lines(tmp_path)) >= line)
    pids = [pid_of(launcher, r) for r in (0, 1)]
    os.kill(pids[rank], signal.SIGKILL)
    output, status = finished(launcher, seconds=60)
    assert status == 128 + signal.SIGKILL, output
    assert f"rank {rank} was killed by SIGKILL; ending the 1 others" in output
    assert not any(map(is_running, pids))
    assert line <= len(lines(tmp_path)) < FIELDS["steps"], "killed after its end"
    output, status = finished(launched(2, command))
    assert status == 0, output
    assert lines(tmp_path) == lines(undisturbed)
    resumed, whole = (
        json.loads((folder / "record.json").read_text())
        for folder in (tmp_path, undisturbed)
    )
    assert resumed["series"] == whole["series"]
    assert resumed["final"] == whole["final"]


def continued(workdir, tmp_path, processes, **fields):
    """Fewer processes go on with a run, as simulated workers do."""
    fewer, alone = tmp_path / "fewer", tmp_path / "alone"
    shutil.copytree(workdir, fewer)
    shutil.copytree(workdir, alone)
    output, status = finished(launched(processes, training(fewer, processes, **fields)))
    assert status == 0, output
    assert output.count(f"has {2 * processes} workers, this run {processes}") == 1
    expected = simulated(alone, processes, **fields)
    record = json.loads((fewer / "record.json").read_text())
    assert record["final"]["steps"] == fields["steps"]
    same_to_rounding(record["series"], expected["series"])


@pytest.mark.slow
def test_two_processes_continue_as_one(undisturbed, tmp_path):
    """Errors are folded, as when simulated workers read the same checkpoint."""
    continued(undisturbed, tmp_path, 1, steps=70)


@pytest.mark.slow
def test_four_processes_continue_as_two(tmp_path):
    four = tmp_path / "four"
    fields = {"methods": ("uniform(0.01)",), "aggregator": "compressed_mean(top_k())"}
    output, status = finished(launched(4, training(four, 4, steps=10, **fields)))
    assert status == 0, output
    continued(four, tmp_path, 2, steps=20, **fields)


POISONED = """
import sys
import jax, numpy as np
from absl import flags
from ml_collections import config_flags
from configs import quickstart
from gcjax import cluster, command, experiment, train

FLAGS = flags.FLAGS
flags.DEFINE_string("coordinator", None, "")
flags.DEFINE_integer("process_id", None, "")
flags.DEFINE_integer("num_processes", None, "")
CONFIG = config_flags.DEFINE_config_file("config", None, "")
flags.DEFINE_string("workdir", None, "")

def own(state):
    return np.asarray(cluster.local(state.opt_state[0].worker.value.error))

def main():
    config = CONFIG.value
    with cluster.process(FLAGS.coordinator, FLAGS.process_id, FLAGS.num_processes):
        config.mapping = "processes"
        task = experiment.build_task(config)

        def loss(params, model_state, batch, key):
            value, model_state = task.loss(params, model_state, batch, key)
            return value * batch["weight"].mean(), model_state

        experiment.build_task = lambda config: task._replace(loss=loss)
        run = train.build(config, config.methods[0])
        state, errors = run.state, []
        for step in range(5):
            batch = run.batches(step)
            batch["weight"] = np.ones(batch["y"].shape, np.float32)
            if step == 3:
                batch["weight"][1] = np.nan
            state, metrics = run.step(state, run.place(batch))
            errors.append(own(state))
            loss, skipped = float(metrics.loss), int(metrics.skipped)
            assert np.isfinite(loss) == (step != 3), (step, loss)
            assert skipped == (step >= 3), (step, skipped)
            assert np.isfinite(errors[-1]).all()
        assert errors[2].any(), "nothing is held back"
        np.testing.assert_array_equal(errors[3], errors[2])
        assert (errors[4] != errors[3]).any(), "training goes on"
        for x in jax.tree.leaves(cluster.local(state.params)):
            assert np.isfinite(x).all()
        print(f"clean {FLAGS.process_id}", flush=True)

command.run(main)
"""


def test_a_rank_with_nan_poisons_no_error(tmp_path):
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED)
    fields = {"methods": ("uniform(0.01)",), "aggregator": "compressed_mean(top_k())"}
    command = [str(script), *training(tmp_path, 2, **fields)[1:]]
    output, status = finished(launched(2, command))
    assert status == 0, output
    assert "clean 0" in output and "[1] clean 1" in output


# --- The launcher by itself. ----------------------------------------------------------


def python(text):
    return [sys.executable, "-c", text]


def test_a_failure_ends_ranks_that_do_not_listen_and_their_children(capfd, tmp_path):
    stubborn = (
        "import os, pathlib, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        f"path = pathlib.Path({str(tmp_path)!r})\n"
        "(path / 'new').write_text(f'{os.getpid()} {child.pid}')\n"
        "(path / 'new').rename(path / 'pids')\n"
        "time.sleep(100)\n"
    )
    # Ends well, and is gone only when the launcher has seen that.
    quick = (
        "import os, pathlib\n"
        f"path = pathlib.Path({str(tmp_path)!r})\n"
        "(path / 'newer').write_text(str(os.getpid()))\n"
        "(path / 'newer').rename(path / 'quick')\n"
    )
    failing = (
        "import os, pathlib, sys, time\n"
        f"path = pathlib.Path({str(tmp_path)!r})\n"
        "while not ((path / 'pids').exists() and (path / 'quick').exists()):\n"
        "    time.sleep(0.01)\n"
        "try:\n"
        "    while True:\n"
        "        os.kill(int((path / 'quick').read_text()), 0)\n"
        "        time.sleep(0.01)\n"
        "except ProcessLookupError:\n"
        "    print('the cause')\n"
        "    sys.exit(3)\n"
    )
    begun = time.monotonic()
    commands = [python(stubborn), python(quick), python(failing)]
    assert cluster.run(commands, grace_seconds=0.2) == 3
    assert time.monotonic() - begun < 20
    printed = capfd.readouterr().err
    assert "[2] the cause" in printed
    assert "launch: rank 2 failed with exit status 3; ending the 1 others" in printed
    pids = (tmp_path / "pids").read_text().split()
    until(lambda: not any(map(is_running, pids)), 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_launcher_ends_the_ranks(number):
    if number == signal.SIGKILL and not shutil.which("setpriv"):
        pytest.skip("needs setpriv")
    command = python("import time; print('here', flush=True); time.sleep(100)")
    launcher = launched(2, command)
    with launcher:
        for _ in range(2):
            assert "here" in launcher.stdout.readline()
        pids = [pid_of(launcher, rank) for rank in (0, 1)]
        launcher.send_signal(number)
        status = launcher.wait(20)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    until(lambda: not any(map(is_running, pids)), 5)


@pytest.mark.parametrize(
    ("command", "processes", "rate", "cause"),
    [
        (["true"], 2, "fast", "rate must be like '100mbit'"),
        (["true"], 2, "0mbit", "rate must be like '100mbit'"),
        (["true"], 300, "1mbit", r"processes must be in \[1, 250\]"),
        (["true"], 0, None, "processes must be at least 1"),
        ([], 2, None, "no command given"),
    ],
)
def test_bad_input_is_refused(command, processes, rate, cause):
    with pytest.raises(ValueError, match=cause):
        cluster.launch(command, processes, rate)


def test_the_script_tells_errors_in_one_line():
    output, status = finished(launched(2, ["true"], "--rate=fast"))
    assert status == 1
    assert output.startswith("error: rate must be like") and output.count("\n") == 1


def test_a_job_step_of_slurm_needs_no_flags(capfd, tmp_path):
    """Two tasks, told by environment variables alone."""
    script = tmp_path / "task.py"
    script.write_text(
        "import jax\n"
        "from gcjax import cluster\n"
        "with cluster.process() as several:\n"
        "    print(several, jax.process_index(), jax.device_count(), flush=True)\n"
    )
    commands = []
    for rank in (0, 1):
        variables = {
            "JOB_ID": os.getpid(),  # JAX makes a port of it
            "STEP_NODELIST": "127.0.0.1",
            "NTASKS": 2,
            "PROCID": rank,
            "LOCALID": rank,
            "STEP_NUM_NODES": 1,
        }
        given = [f"SLURM_{name}={value}" for name, value in variables.items()]
        commands.append(["env", *given, sys.executable, str(script)])
    assert cluster.run(commands, ENVIRONMENT) == 0
    printed = capfd.readouterr()
    assert "True 0 2" in printed.out and "[1] True 1 2" in printed.err


def test_flags_of_one_process_belong_together():
    with pytest.raises(ValueError, match="belong together"):
        with cluster.process("localhost:1234", None, 2):
            pass


def test_processes_need_a_device_for_each_worker():
    config = quickstart.get_config()
    config.mapping, config.num_workers = "processes", 4
    with pytest.raises(ValueError, match="set config.num_workers to 8"):
        train.device_mesh(config)


# --- Networks. ------------------------------------------------------------------------

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("tc"),
    reason="network namespaces need root and iproute2",
)

REDUCE = """
import sys, time
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from gcjax import cluster

flags = dict(word[2:].split("=") for word in sys.argv[1:])
with cluster.process(
    flags["coordinator"], int(flags["process_id"]), int(flags["num_processes"])
):
    mesh = jax.make_mesh((2,), ("workers",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("workers"))
    x = cluster.place(np.ones((2, 250_000), np.float32), sharding)
    mean = jax.shard_map(
        lambda x: jax.lax.pmean(x, "workers"), mesh=mesh,
        in_specs=P("workers"), out_specs=P(),
    )
    mean = jax.jit(mean)
    mean(x).block_until_ready()
    sent, begun = cluster.sent_bytes(), time.perf_counter()
    for _ in range(5):
        mean(x).block_until_ready()
    seconds = time.perf_counter() - begun
    time.sleep(0.5)
    print(f"sent {cluster.sent_bytes() - sent} bytes in {seconds} s", flush=True)
    replicated = NamedSharding(mesh, P())
    before = cluster.sent_bytes()
    cluster.place(np.ones(250_000, np.float32), replicated).block_until_ready()
    print(f"placing sent {cluster.sent_bytes() - before}", flush=True)
"""


@needs_root
def test_a_network_counts_and_limits(tmp_path):
    """An all-reduce of 1 MB among two sends 1 MB, at 100 Mbit/s in 80 ms or more."""
    script = tmp_path / "reduce.py"
    script.write_text(REDUCE)
    launcher = launched(2, [str(script)], "--rate=100mbit")
    output, status = finished(launcher)
    assert status == 0, output
    found = re.findall(r"sent (\d+) bytes in ([\d.]+) s", output)
    assert len(found) == 2, output
    for sent, seconds in found:
        # Headers take 66 of 1,514 bytes, acknowledgements of the other direction more.
        assert 5e6 < int(sent) < 5.5e6
        assert float(seconds) > 0.95 * 8 * 5e6 / 100e6
    # A heartbeat may fall into it, the array would be a million bytes.
    assert all(int(n) < 20_000 for n in re.findall(r"placing sent (\d+)", output))


@needs_root
def test_links_follow_their_rate():
    """Two ranks at different rates, changed in place; nothing else is needed to see."""
    send = (
        "import socket, sys, time\n"
        "print(socket.gethostname())\n"
        "with socket.create_connection((sys.argv[1], 5000)) as c:\n"
        "    begun = time.perf_counter()\n"
        "    c.sendall(bytes(1_000_000)); c.shutdown(socket.SHUT_WR); c.recv(1)\n"
        "    print(8 / (time.perf_counter() - begun))\n"
    )
    receive = (
        "import socket\n"
        "server = socket.create_server(('', 5000)); print(flush=True)\n"
        "while True:\n"
        "    with server.accept()[0] as c:\n"
        "        while c.recv(1 << 20): pass\n"
    )
    with cluster.Network(3) as network:
        server = subprocess.Popen(
            network.command(0, python(receive)), stdout=subprocess.PIPE
        )
        with server:
            server.stdout.readline()

            def mbit(rank):
                argv = [*python(send), network.address(0)]
                argv = network.command(rank, argv)
                out = subprocess.check_output(argv, text=True).split()
                assert out[0] == network.address(rank)
                return float(out[1])

            assert mbit(1) > 200
            network.set_rate([None, "20mbit", "50mbit"])
            before = network.sent_bytes(1)
            assert 15 < mbit(1) < 21
            assert 1_000_000 < network.sent_bytes(1) - before < 1_150_000
            assert 35 < mbit(2) < 52
            network.set_rate("unlimited")
            assert mbit(1) > 200
            server.kill()
    with pytest.raises(ValueError, match="2 rates for 3"):
        network.set_rate(["10mbit"] * 2)


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_network(number):
    command = python("import time; print('here', flush=True); time.sleep(100)")
    launcher = launched(2, command, "--rate=10mbit")
    with launcher:
        for _ in range(2):
            assert "here" in launcher.stdout.readline()
        spaces = {os.readlink(f"/proc/{pid_of(launcher, r)}/ns/net") for r in (0, 1)}
        assert len(spaces) == 2 and os.readlink("/proc/self/ns/net") not in spaces
        launcher.send_signal(number)
        assert launcher.wait(20) != 0

    def left():
        for link in Path("/proc").glob("[0-9]*/ns/net"):
            with contextlib.suppress(OSError):
                if os.readlink(link) in spaces:
                    return True
        return False

    until(lambda: not left(), 5)


def test_a_server_is_a_process_of_its_own_and_changes_nothing(tmp_path):
    """Two workers and a server: the result, and every upload, of simulated workers."""
    fields = {
        "task": "image_classification('digits', 'logistic')",
        "split": "skewed(arithmetic(3), 0.5)",
        "aggregator": "parameter_server(download=top_k(0.2))",
        "methods": ("dagc_r(0.05)",),
        "steps": 12,
        "warmup_steps": 0,
        "eval_every": 6,
        "checkpoint_every": 5,
    }
    command = training(tmp_path / "run", 2, **fields)
    text, status = finished(launched(3, command))
    assert status == 0, text
    record = results.read(tmp_path / "run" / "record.json")
    expected = simulated(tmp_path / "simulated", 2, **fields)
    same_to_rounding(record["series"], expected["series"])
    uploads = record["final"]["upload_bits"]
    assert uploads == expected["final"]["upload_bits"]
    assert uploads[0] > uploads[1] > 0
    assert record["final"]["download_bits"] == expected["final"]["download_bits"] > 0

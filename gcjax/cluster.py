"""Several processes: networks with a bandwidth, a launcher, and arrays across them.

`Network` gives each process of this machine a network interface whose rate is limited;
`launch` starts the processes and watches them; `process` makes one JAX program of them,
here or on a cluster.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

# --- A network with a bandwidth. ------------------------------------------------------

UNLIMITED = "unlimited"
_RATE = re.compile(r"(\d+(\.\d+)?)(kbit|mbit|gbit)")
# What keeps a namespace alive: it names the host, says so, and waits for its parent.
_HOLDER = (
    "import socket, sys; socket.sethostname(sys.argv[1]); print(flush=True); "
    "sys.stdin.read()"
)


class Network:
    """Processes of this machine, each behind a network interface of its own.

    A star of virtual Ethernet links around a bridge, one link for each rank, limited in
    both directions by htb with a plain queue behind it. All namespaces are anonymous
    and live as long as a process in them: whatever ends the calling process, a SIGKILL
    included, ends them too, nothing appears in the host's own network, and networks of
    several callers do not see each other. Linux only; needs root.

    A context manager:

        with Network(4, "100mbit") as network:
            subprocess.Popen(network.command(0, ["python", "worker.py"]))

    In such a process the host name is its address, which is how gloo finds the
    interface; the interface is called eth0, and `sent_bytes()` counts what it sent.

    Args:
      processes: Number of ranks, 1 to 250.
      rate: Limit of every link, such as "10mbit", "100mbit" or "1gbit" (kbit, mbit and
        gbit are 10^3, 10^6 and 10^9 bits per second); None or "unlimited" for none.

    Raises:
      ValueError: for a number of processes or a rate that makes no sense.
      OSError: without root, the tools (iproute2, util-linux) or the kernel's consent.
    """

    def __init__(self, processes: int, rate: str | None = None):
        if not 1 <= processes <= 250:
            raise ValueError(f"processes must be in [1, 250], got {processes}")
        self.processes = processes
        self._wanted = self._per_worker(rate)
        self._rates: list[str | None] = [None] * processes
        self._holders: list[subprocess.Popen] = []  # of each rank, then the bridge's

    def __enter__(self) -> "Network":
        for tool in ("ip", "tc", "unshare", "nsenter"):
            if shutil.which(tool) is None:
                raise FileNotFoundError(
                    f"a network needs the program {tool}: install iproute2 and "
                    "util-linux, or leave out the rate"
                )
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the network; processes still in it lose their connection."""
        for holder in self._holders:
            holder.kill()
            holder.wait()
            holder.stdin.close()
            holder.stdout.close()
            holder.stderr.close()
        self._holders = []

    def address(self, rank: int) -> str:
        """IP address of a rank, valid within the network."""
        return f"10.77.0.{range(1, self.processes + 1)[rank]}"

    def command(self, rank: int, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` as a rank's process."""
        return [*_enter(self._holders[rank], "--net", "--uts"), *argv]

    def set_rate(self, rate: str | None | Sequence[str | None]) -> None:
        """Changes the limit of all links, while processes run.

        Args:
          rate: As in the constructor, or a sequence of one for each rank.
        """
        wanted = self._per_worker(rate)
        bridge: list[str] = []
        for rank, (old, new) in enumerate(zip(self._rates, wanted, strict=True)):
            bridge += _limit(f"port{rank}", old, new)  # what the rank receives
            self._batch("tc", rank, _limit("eth0", old, new))  # what it sends
        self._batch("tc", -1, bridge)
        self._rates = wanted

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank's interface sent so far, headers of all layers included."""
        return sent_bytes(self._holders[rank].pid)

    def _per_worker(self, rate: str | None | Sequence[str | None]) -> list[str | None]:
        one = rate is None or isinstance(rate, str)
        rates = [rate] * self.processes if one else list(rate)
        if len(rates) != self.processes:
            raise ValueError(f"{len(rates)} rates for {self.processes} processes")
        rates = [None if r == UNLIMITED else r for r in rates]
        for r in rates:
            match = _RATE.fullmatch(r or "1gbit")
            if match is None or float(match[1]) == 0:
                raise ValueError(
                    f"rate must be like '100mbit', '1gbit' or 'unlimited', got {r!r}"
                )
        return rates

    def _build(self) -> None:
        for rank in range(self.processes):
            self._holders.append(_hold(self.address(rank)))
        self._holders.append(_hold("bridge"))
        lines = ["link add bridge type bridge", "link set bridge up"]
        for rank, holder in enumerate(self._holders[:-1]):
            peer = f"peer name eth0 netns {holder.pid}"
            lines.append(f"link add port{rank} type veth {peer}")
            lines.append(f"link set port{rank} master bridge up")
        self._batch("ip", -1, lines)
        for rank in range(self.processes):
            address = f"addr add {self.address(rank)}/24 dev eth0"
            self._batch("ip", rank, ["link set lo up", address, "link set eth0 up"])
        self.set_rate(self._wanted)

    def _batch(self, tool: str, holder: int, lines: list[str]) -> None:
        """Runs lines of `ip` or `tc` in a namespace."""
        if not lines:
            return
        done = subprocess.run(
            [*_enter(self._holders[holder], "--net"), tool, "-batch", "-"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OSError(f"cannot build a network: {tool}: {_one_line(done.stderr)}")


def sent_bytes(pid: int | None = None, interface: str = "eth0") -> int:
    """Bytes that an interface sent, where a process (default: this one) lives.

    Raises:
      ValueError: if there is no such interface.
    """
    text = Path(f"/proc/{pid or 'self'}/net/dev").read_text()
    for line in text.splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"there is no network interface {interface!r}")


def _hold(host_name: str) -> subprocess.Popen:
    """Starts the process that keeps a new namespace alive until this one ends."""
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", sys.executable, "-ISc", _HOLDER, host_name],
        stdin=subprocess.PIPE,  # closed when this process ends, however it ends
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
        text=True,
    )
    if not holder.stdout.readline():
        with contextlib.closing(holder.stdin), holder:
            cause = _one_line(holder.stderr.read())
        raise PermissionError(
            f"a network needs root, to make network namespaces ({cause}); run as root, "
            "or leave out the rate"
        )
    return holder


def _enter(holder: subprocess.Popen, *kinds: str) -> list[str]:
    return ["nsenter", f"--target={holder.pid}", *kinds, "--"]


def _limit(device: str, old: str | None, new: str | None) -> list[str]:
    """Lines for `tc` that change a device's limit."""
    if old == new:
        return []
    if new is None:
        return [f"qdisc del dev {device} root"]
    # The quantum shares a link among classes; one class needs none, but htb a number.
    kind = f"parent 1: classid 1:10 htb rate {new} ceil {new} quantum 20000"
    if old is not None:
        return [f"class change dev {device} {kind}"]
    return [
        f"qdisc add dev {device} root handle 1: htb default 10",
        f"class add dev {device} {kind}",
        f"qdisc add dev {device} parent 1:10 pfifo limit 500",
    ]


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


# --- The launcher. --------------------------------------------------------------------


def launch(argv: Sequence[str], processes: int, rate: str | None = None) -> int:
    """Runs a script as several processes of this machine that form one JAX program.

    Each gets the flags --coordinator, --process_id and --num_processes appended. They
    run on CPU unless the environment variable JAX_PLATFORMS says otherwise.

    Args:
      argv: The command; a first word that ends in .py is run by this Python.
      processes: Number of processes.
      rate: None for the host's own network, otherwise see `Network`.

    Returns:
      As `run`.

    Raises:
      ValueError, OSError: as `Network`, and for an empty command.
    """
    if not argv:
        raise ValueError(
            "no command given; it stands after --, such as -- scripts/train.py --config"
        )
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    python = [sys.executable] if argv[0].endswith(".py") else []
    network = contextlib.nullcontext() if rate is None else Network(processes, rate)
    # What ends the program is an exception from here on, so that `finally` is reached.
    with _signals_raise(), network:
        host = "127.0.0.1" if rate is None else network.address(0)
        coordinator = f"{host}:{free_port()}"
        commands = []
        for rank in range(processes):
            command = [
                *python,
                *argv,
                f"--coordinator={coordinator}",
                f"--process_id={rank}",
                f"--num_processes={processes}",
            ]
            commands.append(command if rate is None else network.command(rank, command))
        environment = {"JAX_PLATFORMS": "cpu"} | os.environ
        return run(commands, environment)


def run(
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str] | None = None,
    grace_seconds: float = 10.0,
) -> int:
    """Runs one process for each rank and waits for all; one that fails ends the others.

    Rank 0 writes where this process writes; lines of the others are prefixed by their
    rank and go to standard error. All end with this process, whatever ends it.

    Args:
      commands: A command for each rank.
      environment: Variables of all of them; default: those of this process.
      grace_seconds: How long after SIGTERM the others are killed.

    Returns:
      0 if all ended well; otherwise the exit status of the first to fail, 128 + the
      signal's number if a signal ended it.
    """
    # Where there is setpriv (Linux), even a SIGKILL to this process ends the ranks.
    tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    running: dict[int, subprocess.Popen] = {}
    printers = []
    try:
        for rank, command in enumerate(commands):
            pipe = subprocess.PIPE if rank else None
            running[rank] = subprocess.Popen(
                [*tied, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=subprocess.STDOUT if rank else None,
                start_new_session=True,  # a process group, to be ended as one
            )
            if rank:
                printer = functools.partial(_print_lines, rank, running[rank].stdout)
                printers.append(threading.Thread(target=printer, daemon=True))
                printers[-1].start()
        return _watch(dict(running))
    finally:
        _end(running.values(), grace_seconds)
        for printer in printers:
            printer.join(timeout=1)  # longer only if some stranger holds the pipe


def _watch(running: dict[int, subprocess.Popen]) -> int:
    """Waits until all have ended well, or one has not."""
    while running:
        ended = {r: p.poll() for r, p in running.items() if p.poll() is not None}
        # Ranks that lose their peer fail soon after it: a signal is the likelier cause.
        for rank, status in sorted(ended.items(), key=lambda item: item[1]):
            del running[rank]
            if status:
                how = (
                    f"was killed by {signal.Signals(-status).name}"
                    if status < 0
                    else f"failed with exit status {status}"
                )
                others = f"; ending the {len(running)} others" if running else ""
                print(f"launch: rank {rank} {how}{others}", file=sys.stderr, flush=True)
                return status if status > 0 else 128 - status
        time.sleep(0.02)
    return 0


def _end(processes: Iterable[subprocess.Popen], grace_seconds: float) -> None:
    """Ends processes and all that they started."""
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _print_lines(rank: int, lines: IO[bytes]) -> None:
    with lines:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            print(f"[{rank}] {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Lets SIGINT, SIGTERM and SIGHUP raise SystemExit with the usual exit status."""

    def stop(number: int, frame: Any) -> None:
        for other in old:  # the first is enough: let nothing cut the cleaning up short
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    old = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        old[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# --- One process of several. ----------------------------------------------------------


@contextlib.contextmanager
def process(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
) -> Iterator[bool]:
    """Makes this process one of a JAX program, and ends it without waiting in vain.

    Call it before JAX is used. An error ends the process at once, with exit status 1:
    an orderly end would wait for the others, and they may be waiting for this one.

    Args:
      coordinator: host:port where process 0 listens. None for a job step of Slurm with
        several tasks, where JAX finds out all three by itself, or a single process.
      process_id: Number of this process, below `num_processes`.
      num_processes: Number of processes.

    Yields:
      Whether there are several processes.

    Raises:
      ValueError: if only some of the arguments are given.
    """
    given = (coordinator, process_id, num_processes)
    if any(v is None for v in given) and any(v is not None for v in given):
        raise ValueError(
            "--coordinator, --process_id and --num_processes belong together; give all "
            "three or none"
        )
    if coordinator is None and not _in_slurm_step():
        yield False
        return
    # Its SIGTERM handler would keep the process alive, waiting to be asked.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method="deactivate",
            )
        yield True
    except BaseException as error:
        if isinstance(error, ValueError | OSError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    jax.distributed.shutdown()


def _in_slurm_step() -> bool:
    step = "SLURM_STEP_NODELIST" in os.environ  # not in the batch script around it
    return step and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def place(tree: Any, shardings: Any) -> Any:
    """Makes global arrays of values that every process holds; nothing is sent.

    `jax.device_put` would send replicated values around to see whether they are equal.

    Args:
      tree: Arrays, the same in all processes (of a shard only its owner's part counts).
      shardings: A sharding, or a tree of them.
    """

    def one(sharding: jax.sharding.Sharding, x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    is_leaf = lambda s: isinstance(s, jax.sharding.Sharding)
    shardings = jax.tree.broadcast(shardings, tree, is_leaf=is_leaf)
    return jax.tree.map(one, shardings, tree, is_leaf=is_leaf)


def local(tree: Any) -> Any:
    """This process's copy of replicated arrays, on one of its devices."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)

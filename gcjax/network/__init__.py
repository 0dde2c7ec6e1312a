"""What a step costs on a network: a latency-bandwidth model, and what pays on it.

A step takes the model's own time, the time of compressing (`Codec`, measured on this
machine) and, for each collective, latency times its messages plus its bits over the
link's bandwidth:

python -m gcjax.network --config=configs/quickstart.py --link=100mbit --num_workers=4
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

# A full Ethernet frame has 1514 bytes, as Linux' traffic control counts them, of which
# TCP with time stamps leaves 1448.
ETHERNET_TCP = 1514 / 1448
# The collective that carries each kind of `Words`.
CARRIERS = {
    "gathered": "all-gather",
    "reduced": "all-reduce",
    "scattered": "all-to-all",
    "permuted": "collective-permute",
}


class Link(NamedTuple):
    """What connects one worker to the others."""

    bandwidth_bits_per_s: float  # that it can send
    latency_s: float  # of one message, from the call to its arrival
    overhead: float = ETHERNET_TCP  # bits on the link per bit of a message
    receive_bits_per_s: float | None = None  # where it differs from sending

    @property
    def seconds_per_byte(self) -> float:
        """Time of one byte that every worker both sends and receives."""
        slowest = min(
            self.bandwidth_bits_per_s,
            self.receive_bits_per_s or self.bandwidth_bits_per_s,
        )
        return 8 * self.overhead / slowest


# Bandwidths are nominal. Latencies are round numbers for one hop with its software:
# microseconds for NVLink with NCCL, tens of microseconds for TCP in a data centre, a
# fraction of a millisecond for a local network, and for LTE half of a usual round trip
# of 50 ms. NVLink: 450 GB/s each way on an H100, of which NCCL's all-reduce reaches
# about 370. LTE: 50 Mbit/s down and 20 up are good conditions, not the peak.
LINKS = {
    "nvlink": Link(3.6e12, 5e-6, overhead=450 / 370),
    "100gbit": Link(100e9, 20e-6),
    "25gbit": Link(25e9, 30e-6),
    "10gbit": Link(10e9, 50e-6),
    "1gbit": Link(1e9, 100e-6),
    "100mbit": Link(100e6, 300e-6),
    "10mbit": Link(10e6, 1e-3),
    "lte": Link(20e6, 25e-3, receive_bits_per_s=50e6),
}


class Codec(NamedTuple):
    """What a step of an aggregator costs one worker apart from the wire, and sends."""

    seconds: float  # compression, decompression, new error; see `measure_codec`
    copy_seconds: float  # of copying the gradient once
    # Kind and bytes that one worker contributes, for each collective of a step.
    collectives: tuple[tuple[str, float], ...]


def find_link(name: str) -> Link:
    """A preset of `LINKS`.

    Raises:
      ValueError: for a name that is none; lists them.
    """
    if name not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}, got {name!r}")
    return LINKS[name]


# --- Cost formulas. -------------------------------------------------------------------


def sent_bytes(kind: str, num_bytes: float, num_workers: int) -> float:
    """Bytes that one of N workers sends in a collective to which it gives S bytes.

    All-gather (N - 1) S; all-reduce, a ring, 2 (N - 1) / N S; reduce-scatter and
    all-to-all (N - 1) / N S; collective-permute S. As much is received.

    Raises:
      ValueError: for another kind.
    """
    return num_bytes * _factors(kind, num_workers)[0]


def messages(kind: str, num_workers: int) -> int:
    """Messages of a collective that wait for one another, each for one latency.

    A ring's N - 1 steps, twice that for an all-reduce; the N - 1 messages of an
    all-to-all all start at once.

    Raises:
      ValueError: for an unknown kind.
    """
    return _factors(kind, num_workers)[1]


def _factors(kind: str, num_workers: int) -> tuple[float, int]:
    n = num_workers
    table = {
        "all-gather": (n - 1, n - 1),
        "all-reduce": (2 * (n - 1) / n, 2 * (n - 1)),
        "reduce-scatter": ((n - 1) / n, n - 1),
        "all-to-all": ((n - 1) / n, min(n - 1, 1)),
        "collective-permute": (min(n - 1, 1), min(n - 1, 1)),
    }
    if kind not in table:
        raise ValueError(f"collective must be one of {', '.join(table)}, got {kind!r}")
    return table[kind]


def seconds(kind: str, num_bytes: float, num_workers: int, link: Link) -> float:
    """Predicted time of one collective.

    Args:
      kind: See `sent_bytes`.
      num_bytes: That one worker contributes.
      num_workers: N.
      link: Every worker's link.

    References: Hockney, 1994, The communication challenge for MPP (latency and
      bandwidth); Thakur et al., 2005, Optimization of Collective Communication
      Operations in MPICH (rings).
    """
    wire = sent_bytes(kind, num_bytes, num_workers) * link.seconds_per_byte
    return wire + messages(kind, num_workers) * link.latency_s


def step_seconds(
    codec: Codec, num_workers: int, link: Link, compute_seconds: float = 0.0
) -> float:
    """Predicted time of one step; nothing overlaps."""
    wire = sum(seconds(k, b, num_workers, link) for k, b in codec.collectives)
    return compute_seconds + codec.seconds + wire


def sent_bits(codec: Codec, num_workers: int) -> float:
    """Bits that one worker sends in one step, without the link's overhead."""
    return 8 * sum(sent_bytes(k, b, num_workers) for k, b in codec.collectives)


def break_even(codec: Codec, baseline: Codec, num_workers: int, link: Link) -> float:
    """Bandwidth in bits/s below which an aggregator's step beats a baseline's.

    Of `link` only latency and overhead count, and sending decides.

    Returns:
      Infinity if it is faster at any bandwidth; 0 if it does not pay at any, or only
      above one because it sends more than the baseline.
    """
    free = link._replace(bandwidth_bits_per_s=np.inf, receive_bits_per_s=None)
    slower = step_seconds(codec, num_workers, free)
    slower -= step_seconds(baseline, num_workers, free)
    saved = sent_bits(baseline, num_workers) - sent_bits(codec, num_workers)
    if saved <= 0:
        return 0.0 if slower >= 0 or saved < 0 else np.inf
    return np.inf if slower <= 0 else link.overhead * saved / slower


def dense_bf16(elements: int) -> Codec:
    """Dense bf16 at its best, for free: reduce-scatter and all-gather of 16 bits.

    A worker sends 2 (N - 1) / N * 16 bits per element, as an all-reduce does.
    """
    return Codec(0.0, 0.0, (("all-reduce", 2.0 * elements),))


class Comparison(NamedTuple):
    """A measured step and its prediction."""

    record: Mapping[str, Any]
    predicted_seconds: float
    relative_error: float  # (predicted - measured) / measured


def compare(records: Iterable[Mapping[str, Any]], link: Link) -> list[Comparison]:
    """Predicted beside measured steps.

    Args:
      records: Of each method and rate, a mapping with "rate" (bits/s that a worker can
        send), "num_workers", "words" (32-bit words per step that a worker contributed,
        by the kinds of `Words`: gathered and so on), "step_seconds" and
        "compute_seconds" (measured, the latter without any exchange), "codec_seconds"
        and, optionally, "collectives" (how many a step has, by the same kinds; one of
        each used kind without it).
      link: Its latency and overhead; the bandwidth comes from the records.
    """
    out = []
    for record in records:
        at = link._replace(bandwidth_bits_per_s=record["rate"], receive_bits_per_s=None)
        codec = Codec(
            record["codec_seconds"],
            0.0,
            carried(record["words"], record.get("collectives", {})),
        )
        predicted = step_seconds(
            codec, record["num_workers"], at, record["compute_seconds"]
        )
        measured = record["step_seconds"]
        out.append(Comparison(record, predicted, predicted / measured - 1))
    return out


def carried(
    words: Mapping[str, int], count: Mapping[str, int]
) -> tuple[tuple[str, float], ...]:
    """Collectives that carry words of each kind, evenly over as many as are counted."""
    out = []
    for kind in (kind for kind, number in words.items() if number):
        parts = count.get(kind, 1)
        out += [(CARRIERS[kind], 4 * int(words[kind]) / parts)] * parts
    return tuple(out)


# --- Seconds instead of words, for selectors. -----------------------------------------


class LayerSeconds(NamedTuple):
    """Predicted seconds of every layer at every level; what `layer_seconds` returns.

    The time of a step is `once` + sum_l table[l, v_l], plus what no choice changes.
    """

    link: Link
    num_workers: int
    codec_seconds_per_element: float

    def __call__(self, words: Any, sizes: Any, kinds: tuple[str, ...]) -> np.ndarray:
        """Seconds float64[L, V] of words int64[L, V] through the collectives `kinds`.

        The kind "dense" is uncompressed float32 in an all-reduce that takes place
        anyway: it costs no codec.
        """
        words, sizes = np.asarray(words), np.asarray(sizes)
        columns = []
        for column, kind in zip(words.T, kinds, strict=True):
            carrier = "all-reduce" if kind == "dense" else kind
            sent = sent_bytes(carrier, 4 * column, self.num_workers)
            codec = 0 if kind == "dense" else self.codec_seconds_per_element * sizes
            columns.append(sent * self.link.seconds_per_byte + codec)
        return np.stack(columns, axis=1)

    def once(self, kind: str) -> float:
        """Seconds, whatever their size, of a step's messages through `kind`."""
        return messages(kind, self.num_workers) * self.link.latency_s


def layer_seconds(
    link: str | Link, num_workers: int, codec_seconds_per_element: float = 0.0
) -> LayerSeconds:
    """Time on a link as the cost that `gcjax.lgreco` minimises: its option `cost`.

    Args:
      link: A name of `LINKS`, or a `Link`.
      num_workers: N, at least 2: alone, a worker sends nothing.
      codec_seconds_per_element: Of compressing, decompressing and the new error, such
        as `Codec.seconds` over the number of elements.

    Raises:
      ValueError: for an unknown link, fewer than 2 workers, or negative seconds.
    """
    if isinstance(link, str):
        link = find_link(link)
    if num_workers < 2:
        raise ValueError(f"layer_seconds: num_workers must be >= 2, got {num_workers}")
    if codec_seconds_per_element < 0:
        raise ValueError(
            "layer_seconds: codec_seconds_per_element must be >= 0, got "
            f"{codec_seconds_per_element}"
        )
    return LayerSeconds(link, num_workers, codec_seconds_per_element)

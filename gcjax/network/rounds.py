"""A time axis for training with a server: rounds over links that differ by worker.

A round is computing, then every worker's upload over its own link, then the download;
it ends with the slowest worker. Links are constant or follow a trace of bandwidths.
"""

import statistics
from typing import Any, NamedTuple

import numpy as np

from gcjax.network import ETHERNET_TCP


class Links(NamedTuple):
    """Links of n workers to a server; see `constant` and `varying`.

    A trace is piecewise constant, repeats for ever, and scales both directions.
    """

    upload_bits_per_s: np.ndarray  # float64[n], mean over the trace
    download_bits_per_s: np.ndarray  # float64[n], the same
    latency_s: np.ndarray  # float64[n], of one message
    overhead: float  # bits on the link per bit of a message
    edges_s: np.ndarray  # float64[T + 1], ends of the trace's pieces, from 0
    speed: np.ndarray  # float64[n, T], in units of the mean; mean 1


def constant(
    upload_bits_per_s: Any,
    latency_s: Any = 0.0,
    *,
    download_bits_per_s: Any = None,
    overhead: float = ETHERNET_TCP,
) -> Links:
    """Links whose bandwidths do not change.

    Args:
      upload_bits_per_s: That each worker can send, [n], positive.
      latency_s: Of one message, a number or [n], not negative.
      download_bits_per_s: That each worker can receive, a number or [n]; None: as much
        as it can send.
      overhead: Bits on the link per bit of a message, such as frames' headers.

    Raises:
      ValueError: for numbers out of range or shapes that do not fit.
    """
    upload = np.asarray(upload_bits_per_s, np.float64)
    download = upload if download_bits_per_s is None else download_bits_per_s
    try:
        download = np.broadcast_to(np.asarray(download, np.float64), upload.shape)
        latency = np.broadcast_to(np.asarray(latency_s, np.float64), upload.shape)
    except ValueError:
        raise ValueError(
            f"links: one number or one per worker, {list(upload.shape)}, wanted"
        ) from None
    rates = np.concatenate([upload.ravel(), download.ravel(), [overhead]])
    if upload.ndim != 1 or not upload.size or not (rates > 0).all():
        raise ValueError(
            "links: bandwidths [n] and the overhead must be positive, got "
            f"{upload_bits_per_s}, {download_bits_per_s} and {overhead}"
        )
    if not (np.isfinite(latency) & (latency >= 0)).all():
        raise ValueError(f"links: latencies must be seconds >= 0, got {latency_s}")
    one = np.ones((upload.size, 1))
    return Links(upload, download, latency, overhead, np.array([0.0, 1.0]), one)


def uneven(
    weights: Any,
    order: str,
    *,
    mean_bits_per_s: float = 8.4e6,
    spread: float = 1.0,
    latency_s: float = 0.02,
) -> Links:
    """Constant links whose bandwidths follow a log-normal law, dealt out to workers.

    Args:
      weights: Of each worker, [n].
      order: "with": the larger the weight, the faster the link; "against": the slower;
        "across": in a random order, always the same.
      mean_bits_per_s: Mean bandwidth, the same up and down.
      spread: Standard deviation of the logarithm of a bandwidth, >= 0; the n quantiles
        (i + 1/2) / n stand for draws.
      latency_s: Of one message.

    Raises:
      ValueError: for an unknown order, or numbers out of range.
    """
    if order not in ("with", "against", "across"):
        raise ValueError(
            f"uneven: order must be 'with', 'against' or 'across', got {order!r}"
        )
    weights = np.asarray(weights, np.float64)
    n = len(weights)
    normal = statistics.NormalDist()
    speed = np.exp([spread * normal.inv_cdf((i + 0.5) / n) for i in range(n)])
    speed *= mean_bits_per_s / speed.mean()  # ascending
    rank = np.argsort(np.argsort(weights, kind="stable"))
    if order == "against":
        rank = n - 1 - rank
    if order == "across":
        rank = np.random.default_rng(0).permutation(n)
    return constant(speed[rank], latency_s)


def varying(links: Links, edges_s: Any, speed: Any) -> Links:
    """Links whose bandwidths follow a trace, of unchanged mean.

    Args:
      links: From `constant`; their bandwidths become the means over the trace.
      edges_s: Ends of its pieces, [T + 1], ascending from 0; then it begins again.
      speed: Bandwidth in each piece, in any unit, positive: [n, T], or [T] for all.

    Raises:
      ValueError: for a trace out of range or a shape that does not fit.
    """
    edges, speed = np.asarray(edges_s, np.float64), np.asarray(speed, np.float64)
    n = len(links.latency_s)
    if edges.ndim != 1 or edges.size < 2 or edges[0] or not (np.diff(edges) > 0).all():
        raise ValueError(f"a trace's edges must ascend from 0, got {edges_s}")
    if speed.shape not in ((edges.size - 1,), (n, edges.size - 1)):
        raise ValueError(
            f"a trace of {edges.size - 1} pieces for {n} workers must have shape "
            f"[{n}, {edges.size - 1}], got {list(speed.shape)}"
        )
    if not (np.isfinite(speed) & (speed > 0)).all():
        raise ValueError("a trace's bandwidths must be positive and finite")
    speed = np.broadcast_to(speed, (n, edges.size - 1))
    mean = speed @ np.diff(edges) / edges[-1]
    return links._replace(edges_s=edges, speed=speed / mean[:, None])


def lognormal(
    links: Links, spread: float, piece_s: float, pieces: int, seed: int
) -> Links:
    """Links whose bandwidths are drawn anew for every piece, each by itself.

    Args:
      links: From `constant`; their bandwidths become the means over the trace.
      spread: Standard deviation of the logarithm of a bandwidth, >= 0.
      piece_s: Length of a piece, seconds, positive.
      pieces: Number of pieces, at least 1; then the trace begins again.
      seed: Not negative.

    Raises:
      ValueError: for arguments out of range.
    """
    if not (spread >= 0 and piece_s > 0 and pieces >= 1):
        raise ValueError(
            "lognormal: spread must be >= 0, piece_s positive and pieces >= 1, got "
            f"{spread}, {piece_s} and {pieces}"
        )
    drawn = np.random.default_rng(seed).normal(size=(len(links.latency_s), pieces))
    return varying(links, piece_s * np.arange(pieces + 1), np.exp(spread * drawn))


def upload_seconds(links: Links, bits: Any, start_s: Any = 0.0) -> np.ndarray:
    """Time of each worker's upload, latency included, float64[n]; 0 for no bits.

    Args:
      links: Of n workers.
      bits: That each worker sends, a number or [n].
      start_s: When, on the clock of the trace; a number or [n].
    """
    return _transfer(links, links.upload_bits_per_s, bits, start_s)


def round_seconds(
    links: Links,
    upload_bits: Any,
    download_bits: Any,
    compute_s: Any,
    start_s: float = 0.0,
) -> float:
    """Time of one synchronous round.

    max_i(compute_i + latency_i + bits_i / bandwidth_i) + the same for the download,
    which begins when the last upload has ended. The server's own link sets no limit.

    Args:
      links: Of n workers.
      upload_bits: Of each worker, [n]; 0 for one that takes no part in the upload.
      download_bits: To each worker, a number or [n].
      compute_s: Of each worker, a number or [n].
      start_s: When the round begins, on the clock of the trace.
    """
    compute_s = np.asarray(compute_s, np.float64)
    up = compute_s + upload_seconds(links, upload_bits, start_s + compute_s)
    up = np.max(up)
    down = links.download_bits_per_s
    return float(up + np.max(_transfer(links, down, download_bits, start_s + up)))


def clock(
    links: Links, upload_bits: Any, download_bits: Any, compute_s: Any
) -> np.ndarray:
    """When every round has ended, float64[rounds], the first one beginning at 0.

    Args:
      links: Of n workers.
      upload_bits: Of every round and worker, [rounds, n].
      download_bits: A number, [rounds], or [rounds, n].
      compute_s: As in `round_seconds`; the same in all rounds.
    """
    upload = np.asarray(upload_bits, np.float64)
    download = np.asarray(download_bits, np.float64)
    download = download[:, None] if download.ndim == 1 else download
    download = np.broadcast_to(download, upload.shape)
    now, ends = 0.0, []
    for up, down in zip(upload, download, strict=True):
        now += round_seconds(links, up, down, compute_s, now)
        ends.append(now)
    return np.array(ends)


def _transfer(links: Links, bandwidth: np.ndarray, bits, start_s) -> np.ndarray:
    """Seconds of one message per worker; it enters the link after its latency."""
    n = len(bandwidth)
    bits = np.broadcast_to(np.asarray(bits, np.float64), n)
    if not (bits >= 0).all():
        raise ValueError(f"bits must be >= 0, got {bits.min()}")
    begin = start_s + links.latency_s
    # Seconds at mean bandwidth since 0, by pieces a straight line.
    edges, out = links.edges_s, np.zeros(n)
    period = edges[-1]
    for i in np.flatnonzero(bits > 0):
        work = np.append(0, np.cumsum(links.speed[i] * np.diff(edges)))
        turns, within = np.divmod(begin[i], period)
        target = np.interp(within, edges, work)
        target += links.overhead * bits[i] / bandwidth[i]
        more, rest = np.divmod(target, work[-1])
        end = (turns + more) * period + np.interp(rest, work, edges)
        out[i] = end - begin[i] + links.latency_s[i]
    return out

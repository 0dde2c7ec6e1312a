"""Batches: which samples each worker draws at each step, and how they are prepared."""

import functools
from collections.abc import Callable

import numpy as np


def sampler(
    size: int, seed: int, num_workers: int, batch_size: int
) -> Callable[[int], np.ndarray]:
    """Makes a pure function step -> sample numbers, int64 [num_workers, batch_size].

    Each epoch is a permutation drawn from (seed, epoch), so that workers get disjoint
    shares; what does not fill a step at its end is left out.

    Args:
      size: Number of samples.
      seed: Not negative.
      num_workers: Number of workers.
      batch_size: Samples per worker and step.

    Raises:
      ValueError: Not enough samples for one step.
    """
    per_step = num_workers * batch_size
    if not 1 <= per_step <= size:
        raise ValueError(
            f"num_workers * batch_size must be in [1, {size}], the number of training "
            f"samples, got {num_workers} * {batch_size}"
        )

    @functools.lru_cache(maxsize=2)  # only to save time
    def permutation(epoch):
        return np.random.default_rng((seed, 0, epoch)).permutation(size)

    def pick(step):
        epoch, part = divmod(int(step), size // per_step)
        index = permutation(epoch)[part * per_step : (part + 1) * per_step]
        return index.reshape(num_workers, batch_size)

    return pick


def shard_sampler(
    shards: list[np.ndarray], seed: int, batch_size: int
) -> Callable[[int], np.ndarray]:
    """Makes a pure function step -> sample numbers, int64 [num_workers, batch_size].

    Every worker goes through its own shard, in a permutation drawn from (seed, worker,
    epoch) for each epoch, and begins the next one in the middle of a batch: a worker
    with few samples sees them more often than one with many.

    Args:
      shards: Sample numbers of each worker, none empty.
      seed: Not negative.
      batch_size: Samples per worker and step.

    Raises:
      ValueError: for an empty shard, or a batch size below 1.
    """
    sizes = np.array([len(shard) for shard in shards])
    if batch_size < 1 or sizes.min() < 1:
        raise ValueError(
            f"every worker needs a sample and batch_size must be >= 1, got {batch_size}"
            f" and {sizes.min()} samples for worker {sizes.argmin()}"
        )

    # Only to save time; a batch of a tiny shard spans many epochs.
    @functools.lru_cache(maxsize=len(shards) + 2 * batch_size)
    def permutation(worker, epoch):
        return np.random.default_rng((seed, 3, worker, epoch)).permutation(
            shards[worker]
        )

    def pick(step):
        at = int(step) * batch_size + np.arange(batch_size)
        rows = []
        for worker, size in enumerate(sizes):
            epochs = range(at[0] // size, at[-1] // size + 1)
            joined = np.concatenate([permutation(worker, int(e)) for e in epochs])
            rows.append(joined[at - epochs[0] * size])
        return np.stack(rows)

    return pick


def windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Cuts a text [n] into windows [n', seq_len + 1]; each starts where the last ends.

    Raises:
      ValueError: The text is shorter than a window.
    """
    n = (len(tokens) - 1) // seq_len
    if n < 1:
        raise ValueError(f"{len(tokens)} tokens are too few for {seq_len=}")
    return tokens[np.arange(n)[:, None] * seq_len + np.arange(seq_len + 1)]


def channel_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes mean and standard deviation of each channel, float32 [1, 1, 1, c].

    Args:
      x: Images, uint8 [n, h, w, c].
    """
    # By histograms: exact, and without a copy of all images as floats.
    counts = [np.bincount(x[..., c].ravel(), minlength=256) for c in range(x.shape[-1])]
    share = np.array(counts) / (x.size // x.shape[-1])
    mean = share @ np.arange(256)
    var = np.sum(share * (np.arange(256) - mean[:, None]) ** 2, -1)
    std = np.sqrt(var) + 1e-6  # a channel may be constant
    return tuple(v.astype(np.float32).reshape(1, 1, 1, -1) for v in (mean, std))


def shift_and_mirror(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifts images [N, B, h, w, c] by up to 4 pixels, and mirrors half of them.

    Black pixels move in. It is the usual crop after padding with 4 pixels.

    References:
      He, Zhang, Ren and Sun, 2015, Deep Residual Learning for Image Recognition,
      arXiv:1512.03385, section 4.2.
    """
    padded = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4), (0, 0)))
    shape, (h, w) = x.shape[:2], x.shape[2:4]
    rows = rng.integers(0, 9, shape)[..., None] + np.arange(h)
    columns = rng.integers(0, 9, shape)[..., None] + np.arange(w)
    mirror = rng.random(shape) < 0.5
    columns = np.where(mirror[..., None], columns[..., ::-1], columns)
    worker, sample = (i[..., None, None] for i in np.indices(shape))
    return padded[worker, sample, rows[..., None], columns[..., None, :]]

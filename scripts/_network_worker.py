"""What the workers of both sides of bench_network.py share: models, data, protocol.

NumPy only, so that neither side's process imports the other's framework. Both sides
start from the same parameters and see the same batches: with an exact exchange their
losses agree, which bench_network.py checks.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

BATCH = {"mlp": 32, "cnn": 8}  # samples per worker: a step is a few ms on one core
INPUT = {"mlp": (784,), "cnn": (32, 32, 3)}
WIDTHS = (784, 1024, 1024, 512, 10)  # 2.4 M parameters
CHANNELS = (3, 32, 64, 128)  # 3x3 convolutions, each followed by 2x2 mean pooling
HIDDEN = (2048, 256, 10)  # what follows them; 0.6 M parameters in all
CLASSES = 10
LEARNING_RATE = 0.02
_BATCHES = 8  # different batches of a worker


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's kernels, [in, out] and [h, w, in, out], in their order."""
    sizes = {}
    if model == "cnn":
        for i, pair in enumerate(zip(CHANNELS, CHANNELS[1:], strict=False)):
            sizes[f"conv{i}"] = (3, 3, *pair)
    widths = WIDTHS if model == "mlp" else HIDDEN
    for i, pair in enumerate(zip(widths, widths[1:], strict=False)):
        sizes[f"dense{i}"] = pair
    return sizes


def init(model: str) -> dict[str, dict[str, np.ndarray]]:
    """Parameters: He-normal kernels, zero biases, float32."""
    rng = np.random.default_rng(0)

    def layer(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        kernel = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        bias = np.zeros(shape[-1])
        return {"kernel": kernel.astype("f4"), "bias": bias.astype("f4")}

    return {name: layer(shape) for name, shape in shapes(model).items()}


def batches(model: str, rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A worker's batches: Gaussian inputs that a random linear map labels."""
    shape, size = INPUT[model], BATCH[model]
    teacher = np.random.default_rng(1).normal(size=(int(np.prod(shape)), CLASSES))
    rng, made = np.random.default_rng((2, rank)), []
    for _ in range(_BATCHES):
        x = rng.normal(size=(size, *shape)).astype("f4")
        made.append((x, (x.reshape(size, -1) @ teacher).argmax(1).astype("i4")))
    return made


def arguments() -> argparse.Namespace:
    """The command line of a worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--address", required=True, help="host:port of rank 0")
    parser.add_argument("--model", choices=sorted(BATCH), required=True)
    return parser.parse_args()


def claim_stdout() -> Callable[[dict], None]:
    """Keeps stdout for replies; what libraries print there goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    return reply


def serve(reply: Callable[[dict], None], build: Callable) -> None:
    """Does the steps that requests on stdin ask for, until stdin ends.

    A request is a line {"method": text, "steps": int}. The reply holds for each step
    its `seconds`, the `declared` bytes that it says this worker sent, and its `loss`.

    Args:
      reply: From `claim_stdout`.
      build: method -> (step, read), called at a method's first request: `step()` does
        one step, waits for its result and returns something of which `read` makes
        (loss, declared bytes), outside the time that is taken.
    """
    made = {}
    reply({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        method = request["method"]
        if method not in made:
            made[method] = build(method)
        step, read = made[method]
        seconds, results = [], []
        for _ in range(request["steps"]):
            start = time.perf_counter()
            result = step()
            seconds.append(time.perf_counter() - start)
            results.append(read(result))
        loss, declared = zip(*results, strict=True)
        reply({"seconds": seconds, "loss": loss, "declared": declared})

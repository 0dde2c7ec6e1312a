"""The PyTorch worker of bench_network.py: DistributedDataParallel over gloo."""

import itertools

import _network_worker as shared
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel


def network(model: str) -> nn.Sequential:
    """The model of _network_worker.py, with its first parameters."""
    params, layers, channels = shared.init(model), [], 0
    for name, layer in params.items():
        kernel, bias = (torch.from_numpy(layer[k]) for k in ("kernel", "bias"))
        if name.startswith("conv"):
            *_, channels, out = kernel.shape
            made = nn.Conv2d(channels, out, 3, padding=1)
            kernel, channels = kernel.permute(3, 2, 0, 1), out
            layers += [made, nn.ReLU(), nn.AvgPool2d(2)]
        else:
            made = nn.Linear(*kernel.shape)
            if channels:  # after convolutions: PyTorch's images are [c, h, w]
                side = round((len(kernel) / channels) ** 0.5)
                kernel = kernel.reshape(side, side, channels, -1).permute(2, 0, 1, 3)
                kernel, channels = kernel.reshape(-1, kernel.shape[-1]), 0
                layers.append(nn.Flatten())
            kernel = kernel.T
            layers += [made, nn.ReLU()]
        with torch.no_grad():
            made.weight.copy_(kernel)
            made.bias.copy_(bias)
    return nn.Sequential(*layers[:-1])


def bf16_hook(group, bucket):
    """The mean in bfloat16; PyTorch's own hook of that name refuses gloo."""
    buffer = bucket.buffer()
    small = buffer.to(torch.bfloat16).div_(dist.get_world_size(group))
    future = dist.all_reduce(small, group=group, async_op=True).get_future()
    return future.then(lambda f: buffer.copy_(f.value()[0]))


class Counter:
    """Counts the bytes that hooks hand to all-reduces."""

    def __init__(self):
        self.bytes, self._all_reduce = 0, dist.all_reduce
        dist.all_reduce = self

    def __call__(self, tensor, *args, **kwargs):
        self.bytes += tensor.numel() * tensor.element_size()
        return self._all_reduce(tensor, *args, **kwargs)


def wrap(model: nn.Module, method: str) -> nn.Module:
    """The model with gradients exchanged by a method."""
    if method == "none":
        return model
    kind, _, rank = method.partition(" ")
    # The hook of PowerSGD starts collectives in callbacks. With two buckets their order
    # differs from rank to rank: over gloo the ranks then crash or hang.
    one_bucket = {"bucket_cap_mb": 1024} if kind == "power_sgd" else {}
    wrapped = DistributedDataParallel(model, **one_bucket)
    if kind == "fp16":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif kind == "bf16":
        wrapped.register_comm_hook(None, bf16_hook)
    elif kind == "power_sgd":
        # Error feedback and warm start are on. A rate of 1 compresses whatever gets
        # smaller by it, as gcjax does (the default, 2, only what gets half as large).
        state = powerSGD_hook.PowerSGDState(
            None, int(rank), start_powerSGD_iter=2, min_compression_rate=1
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif kind != "ddp":
        raise ValueError(f"unknown method {method!r} of the PyTorch side")
    return wrapped


def main() -> None:
    """Joins the others and serves requests."""
    args, reply = shared.arguments(), shared.claim_stdout()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{args.address}",
        rank=args.rank,
        world_size=args.processes,
    )
    counter = Counter()

    def tensors(x: np.ndarray, labels: np.ndarray):
        x = torch.from_numpy(x)
        x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x
        return x, torch.from_numpy(labels).long()

    data = [tensors(*batch) for batch in shared.batches(args.model, args.rank)]
    ring = 2 * (args.processes - 1) / args.processes

    def build(method: str):
        model = wrap(network(args.model), method)
        optimizer = torch.optim.SGD(model.parameters(), shared.LEARNING_RATE)
        size = 4 * sum(p.numel() for p in model.parameters())
        next_batch = itertools.cycle(data)

        def step():
            counter.bytes = 0
            x, labels = next(next_batch)
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(x), labels)
            value.backward()
            optimizer.step()
            return value

        def read(value) -> tuple[float, float]:
            # DDP without a hook reduces all gradients where no counter sees it.
            counted = size if method == "ddp" else counter.bytes
            return value.item(), ring * counted

        return step, read

    shared.serve(reply, build)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Question: how far to prune, and when to go from fast nodes to frugal ones?

A phone (slow, frugal, holds no full model), an edge box and a cloud server, alone and
together; three versions of a network; top-k as a choice where gradients are exchanged.
All numbers are made up, of the order of data sheets.

Command: python scripts/pact_plan.py --config=configs/pact_tiers.py
Other targets: the same with --config.deadline_s=90 --config.max_loss=0.7
Expected: the smallest version, first on the edge and then, as far as the deadline
allows, on the phone: 600 J in 59 s, printed as a table.
Time: seconds.
"""

import ml_collections

TOP_LOSS = 2.4


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """All fields of a problem; `gcjax.pact.from_config` reads them."""
    if arg is not None:
        raise ValueError(f"this config takes no argument, got {arg!r}")
    config = ml_collections.ConfigDict()
    config.nodes = (
        _node("cloud", 4e12, 64e9, 70e-12, 24_000, idle_watts=60.0),
        _node("edge", 8e11, 8e9, 30e-12, 18_000, idle_watts=10.0),
        _node("phone", 1e11, 1e9, 12e-12, 9_000, idle_watts=1.0),
    )
    config.links = (
        {"ends": ("cloud", "edge"), "bits_per_s": 2e8, "joules_per_bit": 2.5e-8},
        {"ends": ("edge", "phone"), "bits_per_s": 2e7, "joules_per_bit": 2.5e-7},
        {"ends": ("cloud", "phone"), "bits_per_s": 1e7, "joules_per_bit": 4e-7},
    )
    config.clusters = (
        {"name": "cloud", "members": ("cloud",)},
        {"name": "edge", "members": ("edge",)},
        {"name": "phone", "members": ("phone",)},
        {
            "name": "cloud+edge",
            "members": ("cloud", "edge"),
            "rounds_per_epoch": 8,
            "efficiency": 0.95,
        },
    )
    # Kept share of the channels; cost falls with its square.
    config.versions = tuple(
        {
            "name": f"d{density:g}",
            "parameters": int(6e5 * density**2),
            "flops_per_sample": 2.5e8 * density**2,
            "parameter_bytes": 2.4e6 * density**2,
            "training_bytes": 2e9 * density,
            "curve": {
                "kind": "power",
                "floor": 0.2 + 0.05 * (1 / density - 1),
                "scale": 300.0,
                "exponent": 0.5,
            },
        }
        for density in (1.0, 0.5, 0.25)
    )
    config.switches = tuple(
        {
            "source": a,
            "target": b,
            "jump": {"height": height, "rate": 1.0, "top": TOP_LOSS},
            "flops": 1e9,
        }
        for a, b, height in (
            ("d1", "d0.5", 0.15),
            ("d1", "d0.25", 0.35),
            ("d0.5", "d0.25", 0.2),
        )
    )
    # One value per version; fractions count indices, too.
    config.gradient_levels = (
        {
            "name": "none",
            "up_fraction": (1.0,) * 3,
            "down_fraction": (1.0,) * 3,
            "efficiency": (1.0,) * 3,
        },
        {
            "name": "top-k 1 %",
            "up_fraction": (0.017, 0.017, 0.016),
            "down_fraction": (1.0,) * 3,
            "efficiency": (0.97, 0.96, 0.95),
            "flops_per_parameter": 20.0,
            "bytes_per_parameter": 4.0,
        },
    )
    # What training starts from.
    config.start_version = "d1"
    config.start_cluster = "cloud"
    config.start_loss = 2.2
    # Of an untrained model.
    config.top_loss = TOP_LOSS
    # The target.
    config.max_loss = 0.6
    config.deadline_s = 60.0
    config.max_epochs = 100
    # Shares of its data that a cluster may train on in an epoch.
    config.data_fractions = (0.5, 1.0)
    config.sample_bytes = 3072.0
    config.skew_loss = 0.0
    config.handover_loss = 0.0
    return config


def _node(name, flops_per_s, memory_bytes, joules_per_flop, samples, **more):
    """A node with equally many samples of ten classes."""
    return {
        "name": name,
        "flops_per_s": flops_per_s,
        "memory_bytes": memory_bytes,
        "joules_per_flop": joules_per_flop,
        "histogram": (samples // 10,) * 10,
        **more,
    }

"""Experiments: one file each, `get_config(arg)` and maybe `sweep(add)`."""

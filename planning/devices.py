"""Accelerators: their memory, and how fast they multiply."""

import os
import re
from dataclasses import dataclass

import torch

GIB = 2**30

CONTEXT_GIB = 0.7
"""What a process takes of a GPU before its first tensor: CUDA's context, kernels, and the workspace of cuBLAS."""


@dataclass(frozen=True)
class Device:
    """A device.

    Args:
        name: What it is called.
        gib: Memory that PyTorch sees of it.
        teraflops: Dense products a second in bfloat16 (float16 where it has none), by its data sheet; None: not known.
        context_gib: What of the memory is taken before the first tensor.
    """

    name: str
    gib: float
    teraflops: float | None = None
    context_gib: float = CONTEXT_GIB


# memory as PyTorch tells it in its errors, which is less than the name says: part of it keeps ECC or belongs to the driver
DEVICES = (
    Device("T4-16GB", 14.6, 65),
    Device("V100-16GB", 15.8, 125),
    Device("V100-32GB", 31.7, 125),
    Device("RTX3090-24GB", 23.6, 71),
    Device("RTX4090-24GB", 23.6, 165),
    Device("L4-24GB", 22.0, 121),
    Device("A10G-24GB", 22.0, 70),
    Device("A6000-48GB", 47.4, 155),
    Device("L40S-48GB", 44.4, 362),
    Device("A100-40GB", 39.4, 312),
    Device("A100-80GB", 79.2, 312),
    Device("H100-80GB", 79.1, 989),
    Device("H200-141GB", 139.8, 989),
    Device("B200-180GB", 178.0, 2250),
)


def find_device(name: str | None) -> Device:
    """A device by its name, `cpu`, or a number of GiB; None: the GPU of this machine, or else its CPU.

    Raises:
        ValueError: There is no such device.
    """
    if name is None and torch.cuda.is_available():
        own = torch.cuda.get_device_properties(0)
        return Device(own.name, own.total_memory / GIB)
    if name is None or name.lower() == "cpu":
        return Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, context_gib=0)
    known = {device.name.lower(): device for device in DEVICES}
    if name.lower() in known:
        return known[name.lower()]
    if number := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gib)?", name.lower()):
        return Device(f"{number[1]} GiB", float(number[1]))
    names = ", ".join(device.name for device in DEVICES)
    raise ValueError(f"--device {name} is not known: give a number of GiB, cpu, or one of {names}")

"""Where and with what a run was made: what `vmoe_routers.machine` says, ISA level and kept memory."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform

import torch

from vmoe_routers import _C
from vmoe_routers.machine import cpu_model, package_version

PACKAGES = (
    "vmoe_routers",
    "torch",
    "numpy",
    "soft-moe-pytorch",
    "st-moe-pytorch",
    "mixture-of-experts",
    "POT",
    "transformers",
    "triton",
)


def versions() -> dict[str, str]:
    found = {name: package_version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: text for name, text in found.items() if text}


def keep_memory() -> bool:
    """Whether the C library now keeps all freed memory for the next call, which glibc's does when asked.

    As it comes, it gives a large tensor back to the system, and the next one arrives page by page. How long that
    takes says more about the system, and about what ran before, than about the code that writes the tensor.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    largest_mappings, trim_threshold, never = -4, -1, -1
    return bool(mallopt(largest_mappings, 0) and mallopt(trim_threshold, never))


def machine(device: str, *, memory_kept: bool = False) -> dict:
    """Device, versions, date and ISA level, for the table's head and the JSON."""
    name, found = cpu_model(), versions()
    if device == "cuda":
        name, found["CUDA"] = torch.cuda.get_device_name(), torch.version.cuda or ""
    return {
        "device": device,
        "name": name,
        "cores": os.cpu_count(),
        "isa": _C.isa(),
        "memory_kept": memory_kept,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "versions": found,
    }

"""Description of the machine and the software of a run."""

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
    """Asks the C library to keep freed memory for later calls. Returns whether the library agrees (glibc only).

    By default glibc returns the memory of a large tensor to the system, and the system maps the next tensor page by
    page. The time of this mapping depends on the system and on earlier calls, not on the code that writes the tensor.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    largest_mappings, trim_threshold, never = -4, -1, -1
    return bool(mallopt(largest_mappings, 0) and mallopt(trim_threshold, never))


def machine(device: str, *, memory_kept: bool = False) -> dict:
    """Returns device, versions, date and ISA level."""
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

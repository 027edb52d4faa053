"""Where and with what a run was made."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import vmoe_routers
from vmoe_routers import _C

PACKAGES = (
    "torch",
    "numpy",
    "soft-moe-pytorch",
    "st-moe-pytorch",
    "mixture-of-experts",
    "POT",
    "transformers",
    "triton",
)


def cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"vmoe_routers": vmoe_routers.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
    name, found = cpu_name(), versions()
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

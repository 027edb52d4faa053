"""Describes the machine and the versions that a measurement depends on."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

NOT_INSTALLED = "not installed"


def here_and_now() -> dict[str, Any]:
    """Returns two entries for a measurement: `machine` (see `machine_description`), and `date`, to the minute."""
    return {"machine": machine_description(), "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}


@cache
def machine_description() -> dict[str, str]:
    """Returns the machine and the versions that a measurement depends on, as text.

    The entry `GPU` exists only on a machine with a GPU.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    found = {
        "CPU": f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": f"{cores} used of {os.cpu_count()}",
        "memory": _memory(),
    }
    if torch.cuda.is_available():
        found["GPU"] = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    return found | {
        "system": _system(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "vmoe_routers": package_version("vmoe_routers") or NOT_INSTALLED,
        "timm": package_version("timm") or NOT_INSTALLED,
    }


def cpu_model() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, OSError, ValueError):  # some systems lack these names
        return "unknown"


def _system() -> str:
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def package_version(package: str) -> str | None:
    """Returns the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Reads the available memory, so that a request that cannot fit is refused before any allocation."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Returns the bytes that a process can still allocate, or None if the system does not report them.

    Args:
        device: A CUDA device or the CPU. The system and control groups (containers) limit the memory of the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_read_meminfo(), *map(_left_of_group, _GROUPS)]
    return min((value for value in found if value is not None), default=None)


def in_words(count: float) -> str:
    """Formats a number of bytes, for example "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2g} EiB"


# For control groups of version 2 and version 1: the file of the limit, the file of the used bytes, and the entry of
# memory.stat for the page cache that the kernel frees first.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _read_meminfo() -> int | None:
    try:
        return _field(Path("/proc/meminfo").read_text(encoding="ascii"), "MemAvailable:") * 1024
    except (OSError, ValueError):
        return None


def _left_of_group(group: tuple[str, str, str]) -> int | None:
    limit_path, used_path, cache = group
    try:
        limit, used = int(Path(limit_path).read_text()), int(Path(used_path).read_text())
        used -= _field(Path(used_path).with_name("memory.stat").read_text(), cache)
    except (OSError, ValueError):  # control groups of the other version, or no limit ("max")
        return None
    return max(limit - used, 0)


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        words = line.split()
        if words[:1] == [name]:
            return int(words[1])
    raise ValueError(f"no {name}")

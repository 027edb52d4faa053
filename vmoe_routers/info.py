"""Describes this installation, for reports of errors."""

from __future__ import annotations

import re
from importlib.metadata import requires

import torch

from vmoe_routers import _C
from vmoe_routers.machine import NOT_INSTALLED, machine_description, package_version
from vmoe_routers.ops import WITHOUT_CUDA

_EXTRAS = ("models", "checkpoints", "study", "huggingface")  # extras whose packages the library imports


def info() -> None:
    """Prints the machine, the versions, and the kernels in use."""
    found = machine_description() | {"CPU kernels": f"ISA {_C.isa()}", "CUDA kernels": _cuda_kernels()}
    found["CUDA of torch"] = f"{torch.version.cuda or 'none'}, {torch.cuda.device_count()} devices"
    found |= {name: package_version(name) or NOT_INSTALLED for name in _optional_packages() if name not in found}
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")


def _cuda_kernels() -> str:
    if not _C.cuda_built:
        return "not built"
    state = "not loaded: this torch has no CUDA" if WITHOUT_CUDA else "loaded"
    return f"built for {_C.cuda_architectures}, {state}"


def _optional_packages() -> list[str]:
    """Lists the packages of the extras that the library imports."""
    lines = [line for line in requires("vmoe_routers") or [] if re.search(rf"extra == .({'|'.join(_EXTRAS)})\b", line)]
    return sorted({re.split(r"[^\w.-]", line)[0] for line in lines} - {"vmoe_routers", "vmoe-routers"})

"""Loads the CUDA kernels. Without them, every op refuses CUDA tensors with an error that says how to build them."""

from __future__ import annotations

from typing import NoReturn

import torch

from vmoe_routers import _C

if _C.cuda_built and torch.version.cuda:
    from vmoe_routers import _C_cuda  # noqa: F401  (registers the CUDA kernels)

# The registrations of this library end when this object is freed.
_library = torch.library.Library("vmoe_routers", "IMPL")


def _why(op: str) -> str:
    if _C.cuda_built:
        return (
            f"vmoe_routers: {op} on a CUDA tensor, but torch {torch.__version__} has no CUDA: install a torch with CUDA"
        )
    return (
        f"vmoe_routers: {op} on a CUDA tensor, but vmoe_routers was built without CUDA: with nvcc >= 12.0 and a "
        "torch with CUDA, build it again by pip install --no-build-isolation --force-reinstall "
        "-C cmake.define.VMOE_CUDA=ON ., or move the tensors to the CPU"
    )


def _refuse(op: str) -> None:
    def kernel(*args: object) -> NoReturn:
        raise NotImplementedError(_why(op))

    _library.impl(op, kernel, "CUDA")


def _without_kernel() -> frozenset[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    ours = {name.removeprefix("vmoe_routers::") for name in names if name.startswith("vmoe_routers::")}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in ours if not has_kernel(f"vmoe_routers::{op}", "CUDA"))


WITHOUT_CUDA = _without_kernel()
"""Ops without a CUDA kernel, which refuse CUDA tensors. These are all ops if no CUDA kernels are loaded."""

for _op in WITHOUT_CUDA:
    _refuse(_op)

"""The names and modules that `import vmoe_routers` provides, and the modules that it must not import."""

import importlib
import subprocess
import sys

import pytest

import vmoe_routers as vr

PUBLIC = {
    "ROUTERS",
    "ExpertChoiceRouter",
    "Experts",
    "MoEMlp",
    "SoftRouter",
    "TokenChoiceRouter",
    "aux_loss",
    "capacity",
    "create_router",
    "expert_choice",
    "ksparse_projection",
    "ksparse_transport",
    "sinkhorn",
    "token_choice",
}


def test_import_is_light():
    code = "import sys, vmoe_routers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    heavy = ("timm", "matplotlib", "sklearn", "torchvision", "rich", "jsonargparse", "scipy", "PIL")
    heavy += ("safetensors", "huggingface_hub")
    assert modules.isdisjoint(heavy)
    assert not any(name.startswith("vmoe_routers.models") for name in modules)
    assert done.stderr == ""


def test_public_names():
    assert set(vr.__all__) >= PUBLIC
    for name in vr.__all__:
        assert hasattr(vr, name)
    assert vr.__version__


@pytest.mark.parametrize("name", sorted(PUBLIC - {"ROUTERS"}))
def test_public_names_are_documented(name):
    assert (getattr(vr, name).__doc__ or "").strip()


def test_load_flax_is_public():
    assert callable(importlib.import_module("vmoe_routers.checkpoints").load_flax)


def test_ops_are_registered():
    import torch

    for name in vr.ops.__all__:
        assert hasattr(torch.ops.vmoe_routers, name)

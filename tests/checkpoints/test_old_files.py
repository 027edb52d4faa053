"""State dicts and folders that earlier code wrote (tests/fixtures) load, and give the outputs of that code."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vmoe_routers as vr
from vmoe_routers.checkpoints import CheckpointError, from_pretrained

FIXTURES = Path(__file__).parents[1] / "fixtures"
OPTIONS = {"soft": {"slots_per_expert": 2}, "softmax_token_choice": {"top_k": 2, "capacity_factor": 0.7}}
each_router = pytest.mark.parametrize("router", OPTIONS)


def old_state(router):
    """The state dict of a layer, its input and its output."""
    arrays = load_file(FIXTURES / f"state_dict_0.1.0_{router}.safetensors")
    x, y = arrays.pop("x"), arrays.pop("y")
    return {name.removeprefix("state/"): value for name, value in arrays.items()}, x, y


def layer_of(router):
    return vr.MoEMlp(6, 8, 6, num_experts=4, router=router, group_size=2, **OPTIONS[router]).eval()


@each_router
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(router, assign):
    state, x, y = old_state(router)
    assert state.keys() & {"router.phi", "router.scale", "router.weight"}, "not from the old code"
    given = copy.deepcopy(state)
    layer = layer_of(router)
    layer.load_state_dict(given, assign=assign)
    assert given.keys() == state.keys(), "what the caller holds is as it was"
    torch.testing.assert_close(layer(x), y)
    again = layer_of(router)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_state_dict_of_a_router_alone():
    for router in OPTIONS:
        state, x, _ = old_state(router)
        layer = layer_of(router)
        layer.load_state_dict(state)
        alone = vr.create_router(router, 6, 4, **OPTIONS[router]).eval()
        alone.load_state_dict({k.removeprefix("router."): v for k, v in state.items() if k.startswith("router.")})
        tokens = x.reshape(2, 18, 6)
        assert torch.equal(alone(tokens).combine_tensor(), layer.router(tokens).combine_tensor())


@each_router
def test_a_missing_parameter_is_named(router):
    state, _, _ = old_state(router)
    name = "phi" if router == "soft" else "weight"
    del state[f"router.{name}"]
    with pytest.raises(RuntimeError, match=rf"router\.logits\.{name}"):
        layer_of(router).load_state_dict(state)
    missing, unexpected = layer_of(router).load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([f"router.logits.{name}"], [])


@each_router
def test_folder(router):
    folder = FIXTURES / f"pretrained_0.1.0_{router}"
    assert any(name.endswith(("router.weight", "router.phi")) for name in load_file(folder / "model.safetensors"))
    arrays = load_file(folder / "images_and_logits.safetensors")
    torch.testing.assert_close(from_pretrained(folder)(arrays["images"]), arrays["logits"])


def test_a_parameter_under_both_names_is_refused(tmp_path):
    folder = FIXTURES / "pretrained_0.1.0_softmax_token_choice"
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.1.mlp.router.logits.weight"] = tensors["blocks.1.mlp.router.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.router\.weight: shape \[4, 8\], wanted no such tensor"):
        from_pretrained(tmp_path)

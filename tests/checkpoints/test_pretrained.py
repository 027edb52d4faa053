"""save_pretrained and from_pretrained: round trips, and refusal of invalid folders."""

import copy
import json
import os
import pickle
import random
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional

import vmoe_routers as vr
from vmoe_routers.checkpoints import CheckpointError, from_pretrained, save_pretrained
from vmoe_routers.models import upcycle, vit_moe

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2}


def model(router="soft", **options):
    of_moe = {} if router is None else {"num_experts": 4}
    return vit_moe(**{**SIZES, "router": router, **of_moe, **options}).eval()


def check_same(loaded, saved):
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    images = torch.randn(2, 3, 16, 16, dtype=next(saved.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(loaded(images), saved(images))


@pytest.mark.parametrize("options", [
    *[{"router": name} for name in vr.ROUTERS],
    {"router": None},
    {"router": "soft", "capacity_factor": 1.0, "group_size": 2, "moe_blocks": (0,), "pos_embed": "sincos"},
    {"router": "softmax_token_choice", "top_k": 2, "capacity_factor": 1.05, "drop_path_rate": 0.1},
    {"router": "softmax_expert_choice", "glu": True, "bias": (True, False)},
    {"global_pool": "map", "qk_norm": True, "patch_size": (8, 4)},
    {"global_pool": "token", "pre_logits": True, "num_classes": 0},
], ids=str)  # fmt: skip
def test_round_trip(tmp_path, options):
    saved = model(**options)
    torch.nn.init.normal_(saved.blocks[1].norm1.weight)
    save_pretrained(saved, tmp_path / "deep" / "folder")
    state = torch.random.get_rng_state()
    loaded = from_pretrained(tmp_path / "deep" / "folder")
    assert torch.equal(state, torch.random.get_rng_state())
    check_same(loaded, saved)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    names = ["config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == names
    save_pretrained(loaded, tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "folder" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path, dtype):
    saved = model().to(dtype)
    saved.head.float()
    save_pretrained(saved, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.head.weight.dtype == torch.float32 and loaded.blocks[1].mlp.experts.w1.dtype == dtype


def test_a_loaded_model_can_be_moved_and_compiled(tmp_path):
    save_pretrained(model("softmax_token_choice"), tmp_path)
    loaded = from_pretrained(tmp_path).to("cpu", torch.float64).train()
    loaded.blocks[1].mlp.compile(backend="eager")
    loaded(torch.randn(2, 3, 16, 16, dtype=torch.float64)).sum().backward()
    assert vr.aux_loss(loaded).device.type == "cpu"


def test_copies_know_how_they_were_made(tmp_path):
    saved = model(moe_blocks=[0, 1])
    for i, other in enumerate((copy.deepcopy(saved), pickle.loads(pickle.dumps(saved)))):
        save_pretrained(other, tmp_path / str(i))
        check_same(from_pretrained(tmp_path / str(i)), saved)


def test_another_head_since(tmp_path):
    saved = model()
    saved.reset_classifier(3)
    save_pretrained(saved, tmp_path)
    check_same(from_pretrained(tmp_path), saved)
    saved = model(global_pool="map")
    saved.reset_classifier(3, global_pool="avg")
    save_pretrained(saved, tmp_path)
    check_same(from_pretrained(tmp_path), saved)
    assert from_pretrained(tmp_path).global_pool == "avg"
    saved = model(global_pool="token")
    saved.reset_classifier(3, global_pool="avg")  # the class token remains, but vit_moe cannot make this model
    with pytest.raises(CheckpointError, match=r"cls_token: shape \[1, 1, 16\], wanted no such tensor"):
        save_pretrained(saved, tmp_path)


@pytest.mark.parametrize("options", [
    {"router": "softmax_expert_choice"}, {"pos_embed": "sincos"}, {"router": "soft", "capacity_factor": 1.0},
], ids=str)  # fmt: skip
def test_another_size_since(tmp_path, options):
    saved = model(**options)
    saved.set_input_size(img_size=(16, 24), patch_size=4)
    save_pretrained(saved, tmp_path)
    loaded = from_pretrained(tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded(images), saved(images))


def test_upcycled(tmp_path):
    dense = model(None)
    save_pretrained(dense, tmp_path / "dense")
    options = {"num_experts": 4, "blocks": "last_1", "renormalize": True, "group_size": 2, "top_k": 2}
    sparse = upcycle(from_pretrained(tmp_path / "dense"), router="softmax_token_choice", **options)
    save_pretrained(sparse, tmp_path / "sparse")
    loaded = from_pretrained(tmp_path / "sparse")
    check_same(loaded, sparse)
    assert loaded.blocks[1].mlp.router.top_k == 2 and loaded.blocks[1].mlp.group_size == 2


def test_shared_tensors_and_a_state_dict_from_elsewhere(tmp_path):
    saved = model(moe_blocks=[0, 1])
    saved.blocks[1].mlp.experts = saved.blocks[0].mlp.experts
    save_pretrained(saved, tmp_path)
    check_same(from_pretrained(tmp_path), saved)
    other = {name: torch.full_like(tensor, 0.5) for name, tensor in saved.state_dict().items()}
    save_pretrained(saved, tmp_path, state_dict=other)
    assert (from_pretrained(tmp_path).head.weight == 0.5).all()


def test_arguments_can_be_changed(tmp_path):
    save_pretrained(model("softmax_token_choice", top_k=1), tmp_path)
    changed = from_pretrained(tmp_path, top_k=2, group_size=2)
    assert changed.blocks[1].mlp.router.top_k == 2 and changed.blocks[1].mlp.group_size == 2
    with pytest.raises(CheckpointError, match=r"(?s)differences.*experts\.w1: shape \[4, 16, 64\], wanted"):
        from_pretrained(tmp_path, num_experts=2)


def test_refuses_to_save_what_could_not_be_loaded(tmp_path):
    changed = model()
    changed.blocks[0].mlp = vr.MoEMlp(16, 64, num_experts=4)
    with pytest.raises(CheckpointError, match="the model is not the one that its description makes"):
        save_pretrained(changed, tmp_path)
    with pytest.raises(CheckpointError, match="has no moe_config"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_pretrained(model(), tmp_path / "file" / "folder")
    with pytest.raises(CheckpointError, match="null byte"):
        save_pretrained(model(), tmp_path / "a\0b")
    with pytest.raises(CheckpointError, match="is a meta tensor, wanted values"):
        save_pretrained(model().to("meta"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("", "group_size", 2),
        ("router", "capacity_factor", 2.0),
        ("router", "eval_capacity_factor", 2.0),
        ("router", "renormalize", True),
        ("router", "loss_weights", {"z": 1.0}),
        ("router", "affinity", vr.affinity.Sinkhorn(iterations=3)),
        ("router", "affinity", functional.softmax),  # not the kind of value that the model was made with
    ],
)
@pytest.mark.parametrize("upcycled", [False, True])
def test_refuses_to_lose_an_option_that_was_changed(tmp_path, part, option, value, upcycled):
    router = "sinkhorn_expert_choice"
    changed = upcycle(model(None), router=router, num_experts=4) if upcycled else model(router)
    save_pretrained(changed, tmp_path / "before")
    setattr(changed.blocks[1].mlp.get_submodule(part), option, value)
    wanted = rf"blocks\.1\.mlp\.?{part} has {option} .*would make .*with this option"
    with pytest.raises(CheckpointError, match=wanted):
        save_pretrained(changed, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    if option == "capacity_factor":
        loaded = from_pretrained(tmp_path / "before", capacity_factor=value)
        assert loaded.blocks[1].mlp.router.capacity_factor == value


def test_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    folder = tmp_path / "folder"
    folder.mkdir()
    names = [f"{name}{end}" for name in ("config.json", "model.safetensors") for end in ("", f".{os.getpid()}.partial")]
    for name in names:
        (folder / name).symlink_to(tmp_path / "elsewhere")
    saved = model()
    save_pretrained(saved, folder)
    check_same(from_pretrained(folder), saved)
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        save_pretrained(model(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    save_pretrained(model(), tmp_path)
    return tmp_path


def test_names_the_value_that_json_cannot_represent(tmp_path):
    with pytest.raises(CheckpointError, match=r"represent mean = .* or a value of preprocessing"):
        save_pretrained(model(), tmp_path, preprocessing={"crop": 1.0, "mean": torch.zeros(3)})


def with_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["arguments"] |= changes.pop("arguments", {})
    path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"format_version": 2, "vmoe_routers_version": "9.1"}, "written by vmoe_routers 9.1; this version reads up to 1"),
    ({"format_version": 0}, "not a configuration of a vmoe_routers model"),
    ({"format_version": "1"}, "not a configuration of a vmoe_routers model"),
    ({"architecture": "os.system"}, "not a configuration of a vmoe_routers model"),
    ({"arguments": {"depth": 10**9}}, "depth is 1000000000, more than"),
    ({"arguments": {"num_experts": 10**9}}, "num_experts is 1000000000, more than"),
    ({"arguments": {"embed_dim": 10**12}}, "config.json"),
    ({"arguments": {"img_size": 8 * 10**9}}, "config.json"),
    ({"arguments": {"mlp_ratio": float("inf")}}, "wrong arguments of vit_moe"),
    ({"arguments": {"depth": "2"}}, "wrong arguments of vit_moe"),
    ({"arguments": {"colour": "red"}}, "colour"),
    ({"arguments": {"router": "hard"}}, "hard"),
    ({"arguments": {"device": "cuda"}}, "device"),
    ({"arguments": {"depth": 1}}, "wanted no such tensor"),
])  # fmt: skip
def test_refuses_configurations(folder, changes, message):
    with_config(folder, **copy.deepcopy(changes))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "\xff", "[" * 100_000, '{"format_version": 1}'])
def test_refuses_what_is_no_configuration(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: no"):
        from_pretrained(folder)


@pytest.mark.parametrize("data", [
    b"", b"\0" * 7, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}}",
    struct.pack("<Q", 71) + b'{"head.bias": {"dtype": "F32", "shape": [9999], "data_offsets": [0, 8]}}' + b"\0" * 8,
])  # fmt: skip
def test_refuses_what_is_no_safetensors(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file, or damaged"):
        from_pretrained(folder)


def test_refuses_other_tensors_and_absent_files(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    bias = tensors.pop("head.bias")
    for changed, message in [
        (tensors, "head.bias: missing"),
        (tensors | {"head.bias": bias, "more": bias.clone()}, "more: shape .5., wanted no such tensor"),
        (tensors | {"head.bias": bias[:3]}, "head.bias: shape .3., wanted shape .5."),
        (tensors | {"head.bias": bias.int()}, "head.bias is torch.int32"),
    ]:
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        from_pretrained(folder / "no" / "such")
    for path in ("a\0b", "a" * 5000):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            from_pretrained(path)


def test_a_repository_on_the_hub(folder, monkeypatch):
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options["revision"], options["local_files_only"]))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert from_pretrained("user/name", revision="v1").num_classes == 5
    assert asked == [("user/name", name, "v1", False) for name in ("config.json", "model.safetensors")]

    def offline(*_, **__):
        raise FileNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(CheckpointError, match="user/name: no such folder, and the hub does not provide config"):
        from_pretrained("user/name")


def test_fuzz(folder):
    paths = [folder / "config.json", folder / "model.safetensors"]
    whole = {path: path.read_bytes() for path in paths}
    header = 8 + struct.unpack("<Q", whole[paths[1]][:8])[0]
    draw, refused = random.Random(0), 0
    for _ in range(300):
        path = draw.choice(paths)
        data = bytearray(whole[path])
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        else:
            data[draw.randrange(min(header, len(data)))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            from_pretrained(folder)
        except CheckpointError:
            refused += 1
        path.write_bytes(whole[path])
    assert 150 < refused < 300


def test_names_the_argument_that_json_cannot_represent(tmp_path):
    def make_router(dim, num_experts):
        return vr.create_router("soft", dim, num_experts)

    model = vit_moe(8, 2, embed_dim=16, depth=1, num_heads=2, num_experts=2, router=make_router)
    with pytest.raises(CheckpointError, match=r"cannot represent router = make_router, .* save model\.state_dict\(\)"):
        save_pretrained(model, tmp_path)

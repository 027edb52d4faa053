"""convert: the reference's checkpoints and dense ViTs become folders; other input is refused."""

import io
import random
import shutil

import numpy as np
import parity
import pytest
import torch
from test_flax import flax_params
from test_flax import model as flax_model

from vmoe_routers import cli
from vmoe_routers.checkpoints import CheckpointError, from_pretrained
from vmoe_routers.checkpoints.convert import _ratio, convert, infer_arguments
from vmoe_routers.models import upcycle
from vmoe_routers.options import OptionError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = str(parity.GOLDEN / "ckpt" / "tiny")


def test_the_references_checkpoint_by_the_command(tmp_path, capsys):
    command = ["convert", TINY, str(tmp_path), "--capacity-factor", "1.5", "--group-size", "2", "--top-k", "2"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and "66,730 parameters" in out and "softmax_token_choice" in out
    golden = parity.Golden("vit_tiny_token_tc")
    with torch.no_grad():
        logits = from_pretrained(tmp_path)(golden["images"].permute(0, 3, 1, 2))
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=parity.OUTPUT)


def test_other_routers_and_sizes(tmp_path):
    state = torch.random.get_rng_state()
    converted = convert(TINY, str(tmp_path), router="sinkhorn_expert_choice", img_size=64)
    assert torch.equal(state, torch.random.get_rng_state())
    assert converted.pos_embed.shape == (1, 65, 32)
    assert from_pretrained(tmp_path).moe_config["router"] == "sinkhorn_expert_choice"


def test_soft(tmp_path):
    golden = parity.Golden("vit_tiny_gap_soft_qknorm")
    arguments = infer_arguments(golden.params(), 32)
    np.savez(tmp_path / "soft.npz", **{path: array.numpy() for path, array in golden.params().items()})
    converted = convert(str(tmp_path / "soft.npz"), str(tmp_path / "folder"), img_size=32)
    assert arguments["router"] == "soft" and arguments["qk_norm"] and arguments["global_pool"] == "avg"
    with torch.no_grad():
        logits = converted(golden["images"].permute(0, 3, 1, 2))
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=parity.SOFT_BFLOAT16)


def test_a_dense_vit_and_upcycling(tmp_path):
    dense = flax_model(router=None, pre_logits=True).eval()
    torch.nn.init.normal_(dense.head.weight)
    arrays = {f"params/{path}": array.numpy() for path, array in flax_params(dense).items()}
    np.savez_compressed(tmp_path / "dense.npz", **arrays, step=np.int32(3))
    assert cli.main(["convert", str(tmp_path / "dense.npz"), str(tmp_path / "folder")]) == 0
    loaded, images = from_pretrained(tmp_path / "folder"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), dense(images))
        upcycle(loaded, router="softmax_token_choice", num_experts=2, top_k=2, renormalize=True, capacity_factor=2.0)
        torch.testing.assert_close(loaded(images), dense(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="a dense model has no router, got router 'soft'"):
        convert(str(tmp_path / "dense.npz"), str(tmp_path / "no"), router="soft")


@pytest.mark.parametrize(("change", "message"), [
    ({"embedding/kernel": None}, "no embedding/kernel"),
    ({"embedding/kernel": (8, 8, 3)}, "wanted 4 axes"),
    ({"embedding/kernel": (1, 1, 1, 1 << 18)}, "do not match"),  # of a model larger than memory
    ({"Encoder/encoderblock_9/LayerNorm_0/scale": (32,)}, "wanted consecutive blocks from encoderblock_0 on"),
    ({"Encoder/posembed_input/pos_embedding": (1, 18, 32)}, "which form no square; give img_size"),
    ({"Encoder/posembed_input/pos_embedding": None}, "no position embeddings"),
    ({"Encoder/encoderblock_0/SelfAttention/query/kernel": (32, 5, 8)}, "num_heads 5"),
    ({"Encoder/encoderblock_3/Moe/Router/dense/kernel": None}, "Moe/Router/dense/kernel: missing"),
    ({"more": (2,)}, "more: not used"),
])  # fmt: skip
def test_refuses_other_parameters(tmp_path, capsys, change, message):
    arrays = {path: array.numpy() for path, array in parity.Golden("vit_tiny_token_tc").params().items()}
    for path, shape in change.items():
        arrays.pop(path, None)
        if shape is not None:
            arrays[path] = np.zeros(shape, np.float32)
    np.savez(tmp_path / "a.npz", **arrays)
    assert cli.main(["convert", str(tmp_path / "a.npz"), str(tmp_path / "folder")]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out.strip() == ""
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(("hidden", "width"), [(1000, 768), (341, 1023), (3072, 768), (7, 49), (29, 100)])
def test_the_hidden_width_is_kept(hidden, width):
    assert int(width * _ratio(hidden, width)) == hidden


@pytest.mark.parametrize(("options", "message"), [
    ({"img_size": 0}, "img_size must be at least 1 and below"),
    ({"img_size": -16}, "img_size must be at least 1"),
    ({"img_size": 33}, "img_size 33 is not a multiple of the patch size 8 of"),
    ({"img_size": 8_000_000}, r"img_size 8000000: the model needs at least .* TiB, .* are available"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"top_k": 99}, "top_k 99 is more than the 4 experts of"),
    ({"group_size": 0}, "group_size must be at least 1"),
    ({"capacity_factor": 0.0}, "capacity_factor must be positive and at most"),
    ({"capacity_factor": float("nan")}, "capacity_factor must be positive"),
    ({"capacity_factor": 1e308}, "capacity_factor must be positive"),
    ({"router": "hard"}, "router 'hard' does not exist; there are"),
])  # fmt: skip
def test_refuses_options(tmp_path, options, message):
    with pytest.raises(OptionError, match=message) as error:
        convert(TINY, str(tmp_path / "folder"), **options)
    assert set(error.value.options) == set(options) and not (tmp_path / "folder").exists()


@pytest.mark.parametrize(("source", "folder", "message"), [("", "x", "source must not be"), (TINY, "", "folder must")])
def test_refuses_empty_paths(source, folder, message):
    with pytest.raises(OptionError, match=message):
        convert(source, folder)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_fuzz_of_an_npz_file(tmp_path, save):
    """A mutated file is converted or refused, and the folder is written completely or not at all."""
    dense = flax_model(router=None, pre_logits=True)
    buffer = io.BytesIO()
    save(buffer, **{path: array.numpy() for path, array in flax_params(dense).items()})
    check_fuzz(tmp_path, tmp_path / "a.npz", buffer.getvalue(), str(tmp_path / "a.npz"), 80, begin=b"PK\x01\x02")


@pytest.mark.parametrize(("name", "turns"), [("tiny.index", 150), ("tiny.data-00000-of-00002", 20)])
def test_fuzz_of_a_checkpoint(tmp_path, name, turns):
    for path in (parity.GOLDEN / "ckpt").glob("tiny.*"):
        shutil.copy(path, tmp_path)
    check_fuzz(tmp_path, tmp_path / name, (tmp_path / name).read_bytes(), str(tmp_path / "tiny"), turns)


def check_fuzz(folder, path, whole, source, turns, begin=b""):
    """Changes some bytes (every second time only bytes from `begin` on), and truncates every fifth time."""
    draw, refused = random.Random(0), 0
    start = whole.index(begin)
    for turn in range(turns):
        data = bytearray(whole[: draw.randrange(1, len(whole))] if turn % 5 == 0 else whole)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(start if turn % 2 else 0, len(whole))
            data[place % len(data) : place % len(data) + 1] = bytes([draw.choice([draw.randrange(256), 0, 255, 14])])
        path.write_bytes(data)
        target = folder / str(turn)
        try:
            convert(source, str(target))
        except CheckpointError as error:
            refused += 1
            assert str(folder) in str(error) and not target.exists()
        else:
            assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    assert turns / 5 <= refused <= turns

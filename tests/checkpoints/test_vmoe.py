"""read_vmoe: the reference's checkpoint, checkpoints of the tests' writer, and malicious files."""

import os
import random
import tracemalloc

import parity
import pytest
import torch
import vmoe_writer
from vmoe_writer import MARK, Ext, Pairs, chunk, leaf, pack, raw, slice_nd

from vmoe_routers.checkpoints import CheckpointError, load_flax, read_npz, read_vmoe
from vmoe_routers.checkpoints.vmoe import DTYPES
from vmoe_routers.models import vit_moe

TINY = parity.GOLDEN / "ckpt" / "tiny"
EXPECTED = parity.GOLDEN / "ckpt_tiny_expected.npz"


def equal(found, wanted):
    return (found.dtype, found.shape) == (wanted.dtype, wanted.shape) and torch.equal(found, wanted)


def test_the_references_own_checkpoint():
    expected = read_npz(EXPECTED)
    found = read_vmoe(TINY, whole_state=True)
    assert found["bf16"].dtype == torch.bfloat16 and equal(found["bf16"].float(), expected.pop("bf16").float())
    assert equal(found.pop("step"), expected.pop("step"))
    del found["bf16"]
    assert found.keys() == expected.keys() and all(equal(found[path], expected[path]) for path in found)
    params = read_vmoe(TINY)
    assert {f"params/{path}" for path in params} == found.keys()


def test_the_references_own_checkpoint_gives_its_logits():
    golden = parity.Golden("vit_tiny_token_tc")
    model = vit_moe(
        *(32, 8), num_classes=10, embed_dim=32, depth=4, num_heads=4, mlp_ratio=2.0, router="softmax_token_choice",
        num_experts=4, moe_blocks="every_2", global_pool="token", top_k=2, capacity_factor=1.5, group_size=2,
    ).eval()  # fmt: skip
    load_flax(model, read_vmoe(TINY))
    with torch.no_grad():
        logits = model(golden["images"].permute(0, 3, 1, 2))
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=parity.OUTPUT)


def tree():
    numbers = torch.arange(5 * 6 * 7)
    layers = {f"layer_{i}": {"kernel": torch.randn(4, 3), "bias": torch.full((3,), float(i))} for i in range(12)}
    kinds = {name: (numbers[:10] % 2).to(dtype) for name, dtype in DTYPES.items()}
    odd = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "cut": numbers.float().reshape(5, 6, 7)}
    return {"layers": layers, "kinds": kinds, **odd}


def flat(tree, path=""):
    for key, value in tree.items():
        yield from flat(value, f"{path}{key}/") if isinstance(value, dict) else [(f"{path}{key}", value)]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_slices_and_chunks(tmp_path, shards):
    given = tree()
    index, data = vmoe_writer.content(given, {"cut": (2, 3, 2)}, shards)
    calls = []
    found = read_vmoe(vmoe_writer.write(tmp_path, index, data), progress=lambda *call: calls.append(call))
    wanted = dict(flat(given))
    assert found.keys() == wanted.keys() and all(equal(found[path], wanted[path]) for path in wanted)
    assert len(calls) == len(wanted) and calls[-1][0] == calls[-1][1] > 0


def test_without_version_and_only_the_parameters(tmp_path):
    index, data = vmoe_writer.content({"params": {"cls": torch.ones(2)}, "opt": {"m": torch.zeros(2)}})
    del index["version"]
    prefix = vmoe_writer.write(tmp_path, index, data)
    assert read_vmoe(prefix).keys() == {"cls"}
    assert read_vmoe(str(prefix), whole_state=True).keys() == {"params/cls", "opt/m"}


# Hostile files: each is a file of {"a": four floats} in one shard, with one fault


A = torch.arange(4.0)
RAW = raw(A)
WHOLE = ((0, 4),)


def part(data=RAW, where=WHOLE, shape=(4,), dtype="float32", code=1, slice_code=6):
    return [[chunk(shape, dtype, data, code)], Ext(slice_code, slice_nd(where))]


def index(entry=None, count=1, **more):
    return {"shard_count": count, "index": {"a": entry or leaf((4,), "float32", [WHOLE], [0])}, **more}


def shard(*parts, **more):
    return {MARK: True, "0": list(parts) or [part()], **more}


def halves(*parts, shards=(0, 0)):
    return leaf((4,), "float32", [(p,) for p in parts], list(shards))


HALF = raw(A[:2])
HOSTILE = {
    "version": (index(version="20300101"), shard(), "version '20300101'"),
    "unknown key": (index(more=1), shard(), "unknown key 'more'"),
    "a key twice": (Pairs([("shard_count", 1), ("shard_count", 1)]), shard(), "'shard_count' twice"),
    "no maps": ([1, 2], shard(), "the index is an array, wanted a map"),
    "no index": ({"shard_count": 1}, shard(), "index is missing"),
    "shards beyond belief": (index(count=10**9), shard(), "shard_count is 1000000000"),
    "a shard more": (index(count=2), shard(), "of-00002: no such file"),
    "no shard": (index(count=0), shard(), "in shard 0, wanted one of 0 shards"),
    "leaf's code": (index(Ext(9, b"")), shard(), "unknown code 9, wanted 8"),
    "leaf's kind": (index(3), shard(), "a is an integer, wanted an extension"),
    "chunk's code": (index(), shard(part(code=5)), "unknown code 5, wanted 1 or 3"),
    "slice's code": (index(), shard(part(slice_code=7)), "unknown code 7, wanted 6"),
    "dtype": (index(leaf((4,), "object", [WHOLE], [0])), shard(), "unknown dtype 'object'"),
    "chunk's dtype": (index(), shard(part(dtype="int32")), "chunk of torch.int32, the index says torch.float32"),
    "negative shape": (index(leaf((-4,), "float32", [WHOLE], [0])), shard(), "is -4, wanted at least 0"),
    "huge shape": (index(leaf((2**40,), "float32", [((0, 2**40),)], [0])), shard(), "more than the data files hold"),
    "huge empty": (index(leaf((0, 2**62), "float32", [((0, 0), (0, 2**62))], [0])), shard(), "more than the data"),
    "axes": (index(leaf((1,) * 40, "float32", [((0, 1),) * 40], [0])), shard(), "40 axes, wanted at most 32"),
    "slice outside": (index(halves((0, 2), (2, 5))), shard(), "slice 2:5:None is not within an axis of 4"),
    "negative slice": (index(halves((-2, 2), (0, 2))), shard(), "start of a slice is -2"),
    "slices overlap": (index(halves((0, 2), (1, 3))), shard(part(HALF, ((0, 2),), (2,)), part(HALF, ((1, 3),), (2,))),
                       "overlaps another"),
    "slice twice": (index(halves((0, 2), (0, 2))), shard(), "slice [0:2] twice"),
    "uncovered": (index(halves((0, 2), (2, 3))), shard(), "do not cover the array"),
    "covered twice": (index(halves((0, 4), (2, 4))), shard(), "overlap or exceed the array"),
    "missing part": (index(halves((0, 2), (2, 4))), shard(part(HALF, ((0, 2),), (2,))), "slice [2:4] is missing"),
    "part of no index": (index(), shard(part(HALF, ((0, 2),), (2,))), "which the index does not list for this file"),
    "part twice": (index(), shard(part(), part()), "slice [0:4] twice"),
    "chunk too long": (index(), shard(part(raw(A) * 2, shape=(8,))), "chunks of 32 bytes for slice [0:4], wanted 16"),
    "chunk too short": (index(), shard(part(HALF, shape=(2,))), "chunks of 8 bytes"),
    "chunk of another shape": (index(), shard(part(shape=(5,))), "chunk of 16 bytes for torch.float32 of shape [5]"),
    "leaf of no number": (index(), {MARK: True, "../0": [part()]}, "'../0' is not the number"),
    "leaf beyond": (index(), shard(**{"1": [part()]}), "'1' is not the number of one of the 1 arrays"),
    "leaf written otherwise": (index(), {MARK: True, "00": [part()]}, "'00' is not the number"),
    "leaf twice": (index(), Pairs([(MARK, True), ("0", [part()]), ("0", [part()])]), "'0' twice"),
    "no mark": (index(), {"0": [part()]}, "is missing"),
    "false mark": (index(), {MARK: False, "0": [part()]}, "is not true"),
    "no leaf": (index(), {MARK: True}, "slice [0:4] is missing"),
    **{f"name {name!r}": (index() | {"index": {name: leaf((4,), "float32", [WHOLE], [0])}}, shard(), "is not a name")
       for name in ("", "..", "a/b", "a\\b", "a\0")},
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path, case):
    of_index, of_shard, message = HOSTILE[case]
    prefix = vmoe_writer.write(tmp_path, of_index, [of_shard])
    with pytest.raises(CheckpointError) as error:
        read_vmoe(prefix)
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / "checkpoint."))


def test_the_file_that_the_hostile_ones_are_made_of(tmp_path):
    assert equal(read_vmoe(vmoe_writer.write(tmp_path, index(), [shard()]))["a"], A)
    parts = part(HALF, ((0, 2),), (2,)), part(raw(A[2:]), ((2, 4),), (2,))
    assert equal(read_vmoe(vmoe_writer.write(tmp_path, index(halves((0, 2), (2, 4))), [shard(*parts)]))["a"], A)


@pytest.mark.parametrize(("data", "message"), [
    (b"", "truncated"),
    (b"\xc1", "unexpected byte 0xc1"),
    (b"\xdf\xff\xff\xff\xff", "a wrong length"),
    (b"\x81\xdb\xff\xff\xff\xff", "a wrong length"),
    (b"\x81\xa5index" + b"\x81\xa1a" * 5000, "nested too deeply"),
    (b"\x81\xa5index" + b"\xdd\x00\x00\x10\x00" * 5000, "wanted a map"),
    (pack(index()) + b"\0", "1 bytes follow the content"),
    (b"\x81\xa2\xff\xfe\xc0", "not valid UTF-8"),
])  # fmt: skip
def test_hostile_bytes(tmp_path, data, message):
    prefix = vmoe_writer.write(tmp_path, index(), [shard()])
    prefix.with_suffix(".index").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_vmoe(prefix)


def test_more_than_a_checkpoint_has(tmp_path, monkeypatch):
    """The memory for the description of the files is bounded for files of any length."""
    nothing = chunk((0,), "float32", b"")
    padded = [[nothing, nothing, chunk((4,), "float32", RAW)], Ext(6, slice_nd(WHOLE))]
    prefix = vmoe_writer.write(tmp_path, index(), [shard(padded)])
    assert torch.equal(read_vmoe(prefix)["a"], A)
    monkeypatch.setattr("vmoe_routers.checkpoints.vmoe._MAX_CHUNKS", 2)
    with pytest.raises(CheckpointError, match="data-00000-of-00001: a: more than 2 chunks in all"):
        read_vmoe(prefix)
    os.truncate(f"{prefix}.index", 17 << 20)
    with pytest.raises(CheckpointError, match="wanted an index of at most 16777216"):
        read_vmoe(prefix)


def test_other_things_of_that_name(tmp_path):
    with pytest.raises(CheckpointError, match="Orbax"):
        read_vmoe(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_vmoe(tmp_path / "nowhere")
    for path in ("a\0b", "a" * 5000):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            read_vmoe(path)
    os.mkfifo(tmp_path / "pipe.index")  # opening this pipe would block
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_vmoe(tmp_path / "pipe")


def mutated(draw, data):
    data = bytearray(data)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(data[: draw.randrange(len(data))])
    if kind == 1:
        start = draw.randrange(len(data))
        return bytes(data[:start] + data[start + draw.randrange(1, 9) :])
    for _ in range(draw.randrange(1, 4)):
        where = draw.randrange(len(data))
        data[where] = draw.choice([draw.randrange(256), 0xDD, 0xDF, 0xC9, 0xFF, data[where] ^ 1 << draw.randrange(8)])
    return bytes(data)


def test_fuzz(tmp_path):
    small = {"a": torch.randn(3, 4), "b": {"c": torch.randn(2), "d": torch.tensor(1)}}
    prefix = vmoe_writer.write(tmp_path, *vmoe_writer.content(small, {"a": (3, 2)}))
    files = sorted(tmp_path.iterdir())
    whole = {file: file.read_bytes() for file in files}
    draw, refused = random.Random(0), 0
    tracemalloc.start()
    try:
        for change in range(2000):
            if change == 500:  # tracing takes three quarters of the time
                assert tracemalloc.get_traced_memory()[1] < 4 << 20
                tracemalloc.stop()
            file = draw.choice(files)
            file.write_bytes(mutated(draw, whole[file]))
            try:
                read_vmoe(prefix)
            except CheckpointError as error:
                refused += 1
                assert str(error).startswith(str(prefix))
            file.write_bytes(whole[file])
    finally:
        tracemalloc.stop()
    assert 1000 < refused < 2000  # all other changes only altered a value

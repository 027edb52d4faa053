"""read_npz: numpy's own files are read exactly, and malicious files are refused."""

import io
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from vmoe_routers.checkpoints import CheckpointError, read_npz


def npz(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def npy(header, data=b"", version=b"\x01\x00"):
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def header(dtype="<f4", shape="(2,)", fortran=False):
    return f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes(tmp_path, save):
    draw = np.random.default_rng(0)
    ints = [f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64)]
    kinds = ["bool", "float16", "float32", "float64", *ints]
    arrays = {f"kinds/{kind}": draw.integers(0, 2, (3, 4)).astype(kind) for kind in kinds}
    arrays |= {"scalar": np.float32(2), "empty": np.zeros((0, 3)), "fortran": np.asfortranarray(draw.random((2, 3, 4)))}
    save(tmp_path / "a.npz", **arrays)
    found = read_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].is_contiguous() and np.array_equal(found[name].numpy(), array)
        assert found[name].numpy().dtype == array.dtype and found[name].shape == np.shape(array)


def test_two_bytes_without_a_meaning_are_bfloat16(tmp_path):
    wanted = torch.randn(3, 4).bfloat16()
    np.savez(tmp_path / "a.npz", a=wanted.view(torch.int16).numpy().view("V2"))
    assert torch.equal(read_npz(tmp_path / "a.npz")["a"], wanted)


@pytest.mark.parametrize(("member", "message"), [
    (npy(header("|O"), b"\0" * 8), r"dtype or header '\|O'"),
    (npy(header(">f4"), b"\0" * 8), "dtype or header '>f4'"),
    (npy(header(shape="(2000000000000,)"), b"\0" * 8), "size of 8 bytes"),
    (npy(header(shape="(0, 999999999999)")), "size of 0 bytes"),
    (npy(header(shape="(-2,)"), b"\0" * 8), "dtype or header"),
    (npy(header(shape="(2,)"), b"\0" * 7), "size of 7 bytes"),
    (npy(header(shape="(2,)"), b"\0" * 9), "size of 9 bytes"),
    (npy(header(shape=f"({'1, ' * 40}1)"), b"\0" * 4), "dtype or header"),
    (npy("(" * 5000), "dtype or header"),
    (npy("__import__('os').abort()"), "dtype or header"),
    (npy(header(), b"\0" * 8, b"\x09\x00"), "not an array in numpy's format"),
    (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "a header of 2147483647 bytes"),
    (b"cos\nsystem\n", "not an array in numpy's format"),
    (b"", "not an array in numpy's format"),
])  # fmt: skip
def test_hostile_members(tmp_path, member, message):
    path = npz(tmp_path / "a.npz", [("a.npy", member)])
    with pytest.raises(CheckpointError, match=message) as error:
        read_npz(path)
    assert str(error.value).startswith(f"{path}: ")


def test_hostile_archives(tmp_path):
    path = npz(tmp_path / "bomb.npz", [("a.npy", b"\0" * 10_000_000)], zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="would expand"):
        read_npz(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        path = npz(tmp_path / "twice.npz", [("a.npy", npy(header(), b"\0" * 8))] * 2)
    with pytest.raises(CheckpointError, match="twice"):
        read_npz(path)
    with pytest.raises(CheckpointError, match=r"'a\.pkl' is no array"):
        read_npz(npz(tmp_path / "other.npz", [("a.pkl", b"")]))
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("no.npz", "nowhere.npz", "."):
        with pytest.raises(CheckpointError):
            read_npz(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_fuzz(tmp_path, save):
    buffer = io.BytesIO()
    save(buffer, a=np.random.default_rng(0).random((3, 4), np.float32), **{"b/c": np.arange(5)})
    whole, path = buffer.getvalue(), tmp_path / "a.npz"
    draw, refused = random.Random(0), 0
    tracemalloc.start()
    try:
        for _ in range(400):
            data = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.2 else whole)
            directory = data.find(b"PK\x01\x02") if draw.random() < 0.5 else 0
            for _ in range(draw.randrange(1, 4) if data else 0):
                place = draw.randrange(max(directory, 0), len(data))
                data[place] = draw.choice([draw.randrange(256), 0, 255, 12, 14])  # 12, 14: bzip2, LZMA
            path.write_bytes(data)
            try:
                read_npz(path)
            except CheckpointError:
                refused += 1
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert 120 < refused < 400


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2], ids=["lzma", "bzip2"])
def test_other_compressions_are_refused(tmp_path, method):
    path = npz(tmp_path / "a.npz", [("a.npy", npy(header(), b"\0" * 8))], method)
    with pytest.raises(CheckpointError, match=r"a\.npz: a: compressed by method \d+, wanted a stored or deflated"):
        read_npz(path)


def central(path, at, value):
    """Overwrites bytes of the first member's entry in the archive's directory."""
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02") + at
    data[place : place + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(("at", "value", "message"), [
    (8, b"\1\0", "encrypted"),
    (10, b"\x63\0", "method 99"),
    (20, b"\xff\xff\xff\x7f", "2147483647 stored bytes for"),
    (24, b"\0\x01\0\0", "stored bytes for 256 bytes contradict a file of"),
    (24, b"\xff\xff\xff\x7f", "would expand to"),
])  # fmt: skip
def test_hostile_directories(tmp_path, at, value, message):
    path = npz(tmp_path / "a.npz", [("a.npy", npy(header(), b"\0" * 8))])
    central(path, at, value)
    with pytest.raises(CheckpointError, match=message):
        read_npz(path)


def test_memory_follows_the_bytes_that_are_present(tmp_path):
    """The directory and the header agree on 60 MB, which a truncated deflated stream does not hold."""
    path = npz(tmp_path / "a.npz", [("b.npy", npy(header(shape="(15000000,)"), b"\0" * 1000))], zipfile.ZIP_DEFLATED)
    central(path, 24, (60_000_000 + len(npy(header(shape="(15000000,)")))).to_bytes(4, "little"))
    path.write_bytes(bytes(1_000_000) + path.read_bytes())
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"a\.npz"):
            read_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_no_memory_is_a_checkpoint_error(tmp_path, monkeypatch):
    def none(*_):
        raise MemoryError

    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    monkeypatch.setattr("vmoe_routers.checkpoints.npz._read_array", none)
    with pytest.raises(CheckpointError, match=r"a\.npz.*not enough memory"):
        read_npz(tmp_path / "a.npz")

"""Headers of tar files, against tarfile."""

import io
import tarfile
import time

import pytest

from vmoe_routers.training.tar import _records, members, read_at

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "long/" * 30 + "n" * 90


def write(path, kind="pax", names=("a.png", "b.cls"), **fields):
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * number
            info.mtime = 1.5 if kind == "pax" else 1  # a fraction of a second needs an extended header
            vars_of(info, fields)
            tar.addfile(info, io.BytesIO(bytes([number + 1]) * info.size))
    return path


def vars_of(info, fields):
    for name, value in fields.items():
        setattr(info, name, value)


def found(path):
    with open(path, "rb") as file:
        return [(member, read_at(file, member.offset, member.size)) for member in members(file)]


@pytest.mark.parametrize("kind", FORMATS)
def test_members(tmp_path, kind):
    names = ["a.png", LONG + ".png", "ä.cls", "folder/c.png", "d" * 101 + ".png" if kind != "ustar" else "d"]
    path = write(tmp_path / "a.tar", kind, names)
    with tarfile.open(path) as tar:
        wanted = [((info.name, info.offset_data, info.size), tar.extractfile(info).read()) for info in tar]
    assert found(path) == wanted and [member.name for member, _ in found(path)] == names


def test_only_files_are_members(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "a header for all members"}) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.REGTYPE):
            info = tarfile.TarInfo(f"{LONG}/{kind.decode()}")
            info.type, info.linkname = kind, LONG
            tar.addfile(info)
    assert [member.name for member, _ in found(path)] == [f"{LONG}/0"]


def test_empty(tmp_path):
    write(tmp_path / "a.tar", names=())
    assert found(tmp_path / "a.tar") == []


def test_sizes_above_8_gib(tmp_path):
    """A size above 8 GiB is a binary number in GNU headers, and a record of an extended header in pax."""
    for kind in ("gnu", "pax"):
        info = tarfile.TarInfo("a.png")
        info.size = 9 << 30
        (tmp_path / kind).write_bytes(info.tobuf(FORMATS[kind]))
        with open(tmp_path / kind, "r+b") as file:
            file.truncate(10 << 30)  # a sparse file
        with open(tmp_path / kind, "rb") as file:
            assert next(members(file)).size == 9 << 30


def damaged(raw, at, new):
    return raw[:at] + new + raw[at + len(new) :]


@pytest.mark.parametrize(("damage", "words"), [
    (lambda raw: b"", "no header at byte 0"),
    (lambda raw: raw[:100], "no header at byte 0"),
    (lambda raw: b"text" * 200, "no header at byte 0"),
    (lambda raw: damaged(raw, 0, b"b"), "no header at byte 0"),  # the checksum differs
    (lambda raw: raw[: 512 + 512 + 600], "it ends within a member, which begins at byte 512"),
    (lambda raw: raw[: 512 + 512 + 1024], "no header at byte 2048"),  # cut between two members
])  # fmt: skip
def test_damaged(tmp_path, damage, words):
    path = write(tmp_path / "a.tar", "ustar")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=words):
        found(path)


@pytest.mark.parametrize(
    "records", [b"30 path=a\n", b"x path=a\n", b"0 path=a\n", b"-5 path=a\n", b"9 path a\n", b"path"]
)
def test_damaged_records(tmp_path, records):
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0"))
    with pytest.raises(ValueError):
        found(tmp_path / "a.tar")


def test_negative_size(tmp_path):
    records = b"12 size=-99\n"
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    raw = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + tarfile.TarInfo("b").tobuf()
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(ValueError, match="it ends within a member, which begins at byte 1024"):
        found(tmp_path / "a.tar")


def test_refused_kinds(tmp_path):
    with pytest.raises(ValueError, match="a member of type 'S' at byte 0"):
        found(write(tmp_path / "old.tar", "gnu", ["a.png"], type=tarfile.GNUTYPE_SPARSE))
    with pytest.raises(ValueError, match="a sparse member at byte 0"):
        found(write(tmp_path / "new.tar", "pax", ["a.png"], pax_headers={"GNU.sparse.major": "1"}))
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 2 << 20
    (tmp_path / "large.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(2 << 20))
    with pytest.raises(ValueError, match="an extended header of 2097152 bytes at byte 0"):
        found(tmp_path / "large.tar")


def test_many_records_take_no_time():
    start = time.process_time()
    assert _records(b"6 aa=\n" * 170_000) == {b"aa": b""}  # 1 MB, the longest extended header
    assert time.process_time() - start < 2

"""MessagePack pull parser for untrusted files (github.com/msgpack/msgpack, spec.md).

The caller asks for the kind of object that must come next in its format. Any other kind is an error. Before anything is
allocated, every length is checked against the bytes that remain. So memory is limited to the objects that the caller
keeps. Long binaries are skipped, and their position is returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import NoReturn

from vmoe_routers.checkpoints.error import CheckpointError

_SIZED = {
    **dict(zip((0xC4, 0xC5, 0xC6), (("bin", 1), ("bin", 2), ("bin", 4)), strict=True)),
    **dict(zip((0xC7, 0xC8, 0xC9), (("ext", 1), ("ext", 2), ("ext", 4)), strict=True)),
    **dict(zip((0xD9, 0xDA, 0xDB), (("str", 1), ("str", 2), ("str", 4)), strict=True)),
    **dict(zip((0xDC, 0xDD, 0xDE, 0xDF), (("array", 2), ("array", 4), ("map", 2), ("map", 4)), strict=True)),
    **dict(zip(range(0xCC, 0xD4), [(kind, n) for kind in ("uint", "int") for n in (1, 2, 4, 8)], strict=True)),
}
"""Kind of every tag byte, and the number of bytes of its length or value."""

_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_UNIT = {"str": 1, "bin": 1, "ext": 1, "array": 1, "map": 2}
"""Fewest bytes per unit of length: a byte, an element, or a pair of a map."""


class Reader:
    """Reads the objects of a file in order.

    Args:
        file: The file.
        size: The size of the file in bytes.
        name: The name of the file in messages.
    """

    def __init__(self, file: BufferedReader, size: int, name: str):
        self._file = file
        self.size = self._end = size
        self.name = name
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        """Raises a CheckpointError with this problem, the name of the file and the position."""
        raise CheckpointError(f"{self.name}: {problem} (at byte {self.position})")

    def pairs(self, what: str) -> int:
        """Reads the number of pairs of a map. The pairs follow."""
        return self._wanted("map", what)

    def elements(self, what: str, length: int | None = None) -> int:
        """Reads the number of elements of an array. The elements follow."""
        n = self._wanted("array", what)
        if length is not None and n != length:
            self.fail(f"{what} is an array of {n}, wanted {length}")
        return n

    def text(self, what: str, longest: int = 4096) -> str:
        """Reads a text of at most `longest` bytes."""
        n = self._wanted("str", what)
        if n > longest:
            self.fail(f"{what} is a text of {n} bytes, wanted at most {longest}")
        try:
            return self._take(n).decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8")

    def integer(self, what: str, low: int = 0) -> int:
        """Reads an integer >= `low`."""
        value = self._wanted("int", what)
        if value < low:
            self.fail(f"{what} is {value}, wanted at least {low}")
        return value

    def true(self, what: str) -> None:
        """Reads the constant true."""
        if self._header()[:2] != ("constant", True):
            self.fail(f"{what} is not true")

    def integer_or_nil(self, what: str) -> int | None:
        """Reads an integer >= 0, or nil."""
        start = self.position
        kind, value, _ = self._header()
        if (kind, value) == ("constant", None) or (kind == "int" and (value or 0) >= 0):
            return value
        self.position = start
        self.fail(f"{what} is {value if kind in ('int', 'constant') else _a(kind)}, wanted an integer >= 0 or nil")

    @contextmanager
    def binary(self, what: str) -> Iterator[None]:
        """Enters a binary that holds objects. The last object read in the context must end where the binary ends."""
        with self._within(self._wanted("bin", what), what):
            yield

    @contextmanager
    def extension(self, what: str, *codes: int) -> Iterator[int]:
        """Enters an extension that has one of these codes and holds objects, as `binary` does. Gives the code."""
        kind, n, code = self._header()
        if kind != "ext":
            self.fail(f"{what} is {_a(kind)}, wanted an extension of code {' or '.join(map(str, codes))}")
        if code not in codes:
            self.fail(f"{what} is an extension of the unknown code {code}, wanted {' or '.join(map(str, codes))}")
        with self._within(n or 0, what):
            yield code

    def skip_binary(self, what: str) -> tuple[int, int]:
        """Skips a binary. Gives the position and the number of its bytes."""
        n = self._wanted("bin", what)
        start = self.position
        self.position += n
        return start, n

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fills the buffer with the bytes from position `start`."""
        self._file.seek(start)
        if self._file.readinto(buffer) != len(buffer):
            self.fail("truncated while it was read")

    def at_pairs(self) -> bool:
        """Tells whether the next object is a map."""
        start = self.position
        kind, _, _ = self._header()
        self.position = start
        return kind == "map"

    def skip(self, depth: int = 0) -> None:
        """Skips one object of any kind."""
        if depth > 16:
            self.fail("nested too deeply")
        kind, n, _ = self._header()
        if kind in ("array", "map"):
            for _ in range((n or 0) * _UNIT[kind]):
                self.skip(depth + 1)
        elif kind in _UNIT:
            self.position += n or 0

    def end(self) -> None:
        """Checks that the file ends here."""
        if self.position != self._end:
            self.fail(f"{self._end - self.position} bytes follow the content, wanted none")

    @contextmanager
    def _within(self, n: int, what: str) -> Iterator[None]:
        outer, self._end = self._end, self.position + n
        yield
        if self.position != self._end:
            self.fail(f"{what} has {self._end - self.position} bytes after its content, wanted none")
        self._end = outer

    def _wanted(self, wanted: str, what: str) -> int:
        kind, value, _ = self._header()
        if kind != wanted:
            self.fail(f"{what} is {_a(kind)}, wanted {_a(wanted)}")
        assert value is not None
        return value

    def _take(self, n: int) -> bytes:
        if n > self._end - self.position:
            self.fail(f"truncated: {n} bytes wanted, {self._end - self.position} left")
        self._file.seek(self.position)
        data = self._file.read(n)
        if len(data) != n:
            self.fail("truncated while it was read")
        self.position += n
        return data

    def _header(self) -> tuple[str, int | None, int]:
        """Reads the kind of an object, its value or length, and the code of an extension."""
        tag = self._take(1)[0]
        code = 0
        if tag < 0x80 or tag >= 0xE0:
            return "int", tag if tag < 0x80 else tag - 256, code
        if tag < 0xC0:
            kind, n = ("map", tag & 15) if tag < 0x90 else ("array", tag & 15) if tag < 0xA0 else ("str", tag & 31)
        elif tag in _CONSTANTS:
            return "constant", _CONSTANTS[tag], code
        elif tag in _FIXED_EXT:
            kind, n = "ext", _FIXED_EXT[tag]
        elif tag in _SIZED:
            kind, width = _SIZED[tag]
            n = int.from_bytes(self._take(width), "big", signed=kind == "int")
            if kind in ("int", "uint"):
                return "int", n, code
        elif tag in (0xCA, 0xCB):
            self._take(4 if tag == 0xCA else 8)
            return "float", None, code
        else:
            self.fail(f"not MessagePack: unexpected byte 0x{tag:02x}")
        if kind == "ext":
            code = int.from_bytes(self._take(1), "big", signed=True)
        if n * _UNIT[kind] > self._end - self.position:
            self.fail(f"truncated, or a wrong length: {_a(kind)} of {n} with {self._end - self.position} bytes left")
        return kind, n, code


def _a(kind: str) -> str:
    names = {"int": "an integer", "array": "an array", "ext": "an extension", "bin": "a binary", "str": "a text"}
    return names.get(kind, f"a {kind}")

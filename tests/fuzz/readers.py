"""Fuzzes the readers of checkpoints with atheris: a reader reads any file, or raises CheckpointError.

    python tests/fuzz/readers.py tests/fuzz/corpus            # until Ctrl-C or a fault; options are libFuzzer's
    python tests/fuzz/readers.py tests/fuzz/corpus/npz        # one input again
    python tests/fuzz/readers.py --write tests/fuzz/corpus    # makes the inputs npz, vmoe and pretrained

The first byte of an input chooses the reader. A reader of two files gets N bytes, and then the remaining bytes; the
second and third byte of the input are N.
"""

from __future__ import annotations

import importlib
import inspect
import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType, ModuleType

import torch

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-checkpoints-"))
READERS = (  # per reader: the function, its path, and the files that it reads
    ("read_npz", "a.npz", ("a.npz",)),
    ("read_vmoe", "a", ("a.index", "a.data-00000-of-00001")),
    ("from_pretrained", "", ("config.json", "model.safetensors")),
)


def read(data: bytes) -> None:
    """Writes the files of an input and reads them."""
    from vmoe_routers import checkpoints

    function, path, names = READERS[data[0] % len(READERS) if data else 0]
    size = int.from_bytes(data[1:3], "little")
    parts = (data[1:],) if len(names) == 1 else (data[3 : 3 + size], data[3 + size :])
    for name, part in zip(names, parts, strict=True):
        (FOLDER / name).write_bytes(part)
    with suppress(checkpoints.CheckpointError):
        getattr(checkpoints, function)(FOLDER / path)


def functions(module: ModuleType) -> Iterator[FunctionType]:
    """Lists functions and methods. atheris cannot instrument the import of an editable package."""
    owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for value in (value for owner in owners for value in vars(owner).values()):
        function = inspect.unwrap(value) if callable(value) else value
        if isinstance(function, FunctionType) and function.__module__ == module.__name__:
            yield function


def write(corpus: Path) -> None:
    """Writes a small valid input for every reader."""
    import numpy as np

    from vmoe_routers.checkpoints import save_pretrained
    from vmoe_routers.models import vit_moe

    sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
    import vmoe_writer

    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.arange(6, dtype=np.float32).reshape(2, 3), **{"b/c": np.int64(1)})
    small = {"a": torch.arange(12.0).view(3, 4), "b": {"c": torch.ones(2), "d": torch.tensor(1)}}
    prefix = Path(vmoe_writer.write(FOLDER, *vmoe_writer.content(small, {"a": (3, 1)}, shard_count=1)))
    save_pretrained(vit_moe(4, 2, 1, 2, 4, 1, 1, 1.0, router="soft", num_experts=2), FOLDER)
    corpus.mkdir(exist_ok=True)
    (corpus / "npz").write_bytes(b"\0" + buffer.getvalue())
    shards = sorted(FOLDER.glob(f"{prefix.name}.*data*"))
    pairs = {
        "vmoe": (FOLDER / f"{prefix.name}.index", *shards),
        "pretrained": [FOLDER / name for name in READERS[2][2]],
    }
    for number, (name, (first, second)) in enumerate(pairs.items(), 1):
        head = first.read_bytes()
        (corpus / name).write_bytes(bytes([number]) + len(head).to_bytes(2, "little") + head + second.read_bytes())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    else:
        import atheris

        for module in ("_files", "_msgpack", "npz", "pretrained", "vmoe"):
            for function in functions(importlib.import_module(f"vmoe_routers.checkpoints.{module}")):
                atheris.instrument_func(function)
        importlib.import_module("vmoe_routers.models")  # otherwise the first input would take seconds

        atheris.Setup(sys.argv, read)
        atheris.Fuzz()

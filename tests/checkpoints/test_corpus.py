"""The kept inputs of tests/fuzz/readers.py: each input is read, or refused by a CheckpointError."""

import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))
import readers as target  # noqa: E402

CORPUS = sorted((FUZZ / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus_is_read_or_refused(path):
    target.read(path.read_bytes())


def test_valid_inputs_reach_every_reader(monkeypatch):
    from vmoe_routers import checkpoints

    read = []
    for name in ("read_npz", "read_vmoe", "from_pretrained"):
        reader = getattr(checkpoints, name)
        monkeypatch.setattr(checkpoints, name, lambda path, reader=reader: read.append(reader(path)))
    for name in ("npz", "vmoe", "pretrained"):
        target.read((FUZZ / "corpus" / name).read_bytes())
    assert [type(result).__name__ for result in read] == ["dict", "dict", "MoEVisionTransformer"]

"""The benchmark of the loader, on a few images."""

import re

from benchmarks import loader


def test_loader(monkeypatch, capsys, one_thread):
    monkeypatch.setattr(loader, "IMAGES", 8)
    monkeypatch.setattr(loader, "MEMBERS", 20)
    monkeypatch.setattr("sys.argv", ["loader", "--workers", "0", "--batch-size", "2", "--steps", "2"])
    loader.main()
    said = capsys.readouterr().out
    assert "8 JPEG files of 224 x 224 pixels" in said
    assert re.search(r"opening shards of 20 images: \d+ images/s\n", said)
    line = r": \d+ images/s alone; ViT-Ti/16 on cpu: \d+ ms per step of 2 images, \d+\.\d% of it waiting for data\n"
    assert len(re.findall(line, said)) == 2

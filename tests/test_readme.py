"""The Python blocks of README and docs/ run unchanged, from top to bottom of each page."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers.routers import router_options

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run(page: Path) -> dict[str, object]:
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, page.name, "exec"), names)
    return names


def test_readme_runs(capsys):
    names = run(README)
    output, tokens = names["output"], names["tokens"]
    assert isinstance(output, torch.Tensor)
    assert isinstance(tokens, torch.Tensor)
    assert output.shape == tokens.shape
    assert tokens.grad is not None
    assert capsys.readouterr().out.count("tensor") == 3


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if BLOCK.search(page.read_text())], ids=lambda p: p.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)  # pages write files
    threads = torch.get_num_threads()
    try:
        assert run(page)
    finally:
        torch.set_num_threads(threads)


def test_routers_page_has_every_option():
    options = set().union(*map(router_options, vr.ROUTERS)) - {"device", "dtype"}
    section = (ROOT / "docs" / "routers.md").read_text().split("## Options")[1].split("\n## ")[0]
    assert options <= set(re.findall(r"`(\w+)`", section))


def test_readme_is_short():
    assert len(README.read_text().split()) <= 900


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_picture_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("sklearn")
    from matplotlib import image

    script = runpy.run_path(str(ROOT / "scripts" / "six_routers.py"))
    script["draw"](tmp_path / "six.png")
    size = [image.imread(path).shape for path in (tmp_path / "six.png", script["PAGE"])]
    assert size[0] == size[1]

"""The Python blocks of README and docs/ run unchanged, from top to bottom of each page."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers.cli import COMMANDS
from vmoe_routers.routers import router_options

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
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
    for package in ("timm", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    from matplotlib import image

    monkeypatch.chdir(tmp_path)  # pages write files
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of small models mostly wait for each other
    try:
        assert run(page)
    finally:
        torch.set_num_threads(threads)
    for drawn in tmp_path.glob("*.png"):
        if (DOCS / drawn.name).exists():
            assert image.imread(drawn).shape == image.imread(DOCS / drawn.name).shape


OPTIONS = {router: router_options(router) - {"device", "dtype"} for router in vr.ROUTERS}


def options_of(page: Path) -> str:
    return page.read_text().split("## Options")[1].split("\n## ")[0]


def test_routers_page_has_every_option():
    assert set().union(*OPTIONS.values()) <= set(re.findall(r"`(\w+)(?:=[^`]+)?`", options_of(DOCS / "routers.md")))


SECTIONS = ["Equation", "When to use it", "Cost", "Pitfalls", "Parity", "Options"]


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_page_of_a_router_has_its_sections_and_its_defaults(router):
    page = DOCS / "routers" / f"{router}.md"
    assert re.findall(r"^## (.*)", page.read_text(), re.M) == SECTIONS
    assert f"]({router}.png)" in page.read_text()
    (code,) = BLOCK.findall(options_of(page))
    shown = set(re.findall(r"(\w+)=", code)) - {"dim", "num_experts"}
    sparse = set.intersection(*(set(OPTIONS[name]) for name in vr.ROUTERS if name != "soft")) - {"renormalize"}
    assert shown <= OPTIONS[router] and OPTIONS[router] - shown <= sparse
    assert repr(run(page)["router"]) == repr(vr.create_router(router, 64, 4))


def test_page_of_the_command_line_has_every_command():
    page = (DOCS / "cli.md").read_text()
    assert all(f"| `vmoe-routers {name}" in page for name in COMMANDS)


def test_readme_is_short():
    assert len(README.read_text().split()) <= 900


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_pictures_can_be_drawn_again(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("sklearn")
    from matplotlib import image

    script = runpy.run_path(str(ROOT / "scripts" / "six_routers.py"))
    script["draw"](tmp_path / "six.png")
    sizes = [image.imread(path).shape for path in (tmp_path / "six.png", script["PAGE"])]
    script = runpy.run_path(str(ROOT / "scripts" / "router_pictures.py"))
    script["draw"]("soft", tmp_path / "soft.png")
    sizes += [image.imread(path).shape for path in (tmp_path / "soft.png", script["FOLDER"] / "soft.png")]
    monkeypatch.syspath_prepend(ROOT / "scripts")  # one script imports another
    script = runpy.run_path(str(ROOT / "scripts" / "inspect_pictures.py"))
    script["draw"](tmp_path)
    names = [f"inspect_{name}.png" for name in ("tokens", "load", "plan", "slots")]
    sizes += [image.imread(folder / name).shape for name in names for folder in (tmp_path, ROOT / "docs")]
    assert sizes[::2] == sizes[1::2]

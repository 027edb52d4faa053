"""Own routers in a study: `package.module:factory`."""

import csv
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from records import run as made_up_run
from records import variant as made_up_variant
from rich.console import Console
from test_runs import TINY, made_up

from vmoe_routers import ROUTERS, cli
from vmoe_routers.options import OptionError
from vmoe_routers.study import Variant, figures, run_study, variants
from vmoe_routers.study.memory import check_memory
from vmoe_routers.study.own import source_digest
from vmoe_routers.study.records import read_record, run_record, write_record
from vmoe_routers.study.runs import run
from vmoe_routers.study.styles import style

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_router.py"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current folder, which is in the path; returns the name of the module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(source, name="mine"):
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_study_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Worker processes import a module of the current folder, too."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE, tmp_path / "routers_of_mine.py")
    options = "--seeds 1 --epochs 1 --max-images 40 --width 16 --depth 2 --heads 2 --num-experts 4 --group-size 4"
    routers = "soft,routers_of_mine:HashRouter"
    arguments = f"study --routers {routers} --capacity-factors .5,1 --batch-size 16 --workers 1 {options}".split()
    try:
        assert cli.main(arguments) == 0
    finally:
        sys.modules.pop("routers_of_mine", None)
    assert "HashRouter " in capsys.readouterr().out
    folder = tmp_path / "study"
    with open(folder / "table.csv", newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["dense", "soft-c0.5", "soft-c1", "HashRouter"]
    own = rows["HashRouter"]
    assert (own["label"], own["router"]) == ("HashRouter", "routers_of_mine:HashRouter")
    assert float(own["slots"]) == 16 and own["capacity_factor"] == own["top_k"] == ""
    (path,) = folder.glob("runs/HashRouter-seed0-*.json")
    (layer,) = json.loads(path.read_text())["layers"]
    assert layer["load"] == [4.0] * 4 and layer["dropped"] == 0
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "HashRouter</th>" in report and style("routers_of_mine:HashRouter").color in report
    assert "HashRouter" in (folder / "figure_1.csv").read_text() + (folder / "figure_load.csv").read_text()


def test_variants_have_no_capacity_and_no_name_twice():
    own = Variant("a.b:Mine")
    settings = replace(TINY, routers=["a.b:Mine", "soft"], capacity_factors=[0.5, 1.0])
    assert variants(settings) == [Variant(), own, Variant("soft", 0.5), Variant("soft", 1.0)]
    assert own.name == own.label == "Mine"
    for routers in (["a:Mine", "b:Mine"], ["a:dense"]):
        with pytest.raises(OptionError, match=r"the name '(Mine|dense)' must not be used twice"):
            variants(replace(TINY, routers=routers))


@pytest.mark.parametrize("router", ["mine:", ":Router", "mine:a.b", "a/b:Router", "a b:c", "a:b:c", "a..b:c", "1:a"])
def test_settings_refuse_other_forms(router):
    with pytest.raises(OptionError, match=r"routers: '.*' is none of .*, or package\.module:factory"):
        replace(TINY, routers=[router])


@pytest.mark.parametrize(("source", "name", "words"), [
    ("", "nowhere:Router", "'nowhere:Router' cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ("1 / 0", "mine:Router", "'mine:Router' cannot be imported: ZeroDivisionError: division by zero"),
    ("def (", "mine:Router", "'mine:Router' cannot be imported: SyntaxError"),
    ("", "mine:Router", "'mine:Router' must be a function or class, .*, got no Router in the module"),
    ("Router = 3", "mine:Router", "'mine:Router' must be a function or class, .*, got int"),
    ("from torch import nn; Router = nn.Identity()", "mine:Router", "must be a function or class, .*, got Identity"),
    ("Router = max", "mine:Router", "'mine:Router' fails: TypeError: MoEMlp: router must make an nn.Module"),
    ("def Router(dim): pass", "mine:Router", "'mine:Router' fails: TypeError: MoEMlp: .* too many positional"),
])  # fmt: skip
def test_what_is_no_factory_is_one_line(module, capsys, source, name, words):
    module(source)
    assert cli.main(["study", "--routers", f"soft,{name}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not Path("study").exists()
    with pytest.raises(OptionError, match=rf"^routers: .*{words}"):
        run_study(replace(TINY, routers=[name]), Console(file=io.StringIO()))


UNCOUNTED = """
import torch
from torch import nn
import vmoe_routers as vr

class Router(nn.Module):
    def __init__(self, dim, num_experts):
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.table = torch.arange(num_experts).tolist()  # which a tensor on the meta device would refuse

    def forward(self, x, mask=None):
        gates = x[..., : self.num_experts].float().softmax(-1)
        return vr.token_choice(gates, top_k=1, capacity=x.shape[1] // 2, mask=mask)
"""


def test_a_router_that_does_not_say_its_slots(module, tmp_path):
    variant = Variant(f"{module(UNCOUNTED)}:Router")
    settings = replace(TINY, epochs=1)
    assert check_memory(settings, [Variant(), variant], [], 8) >= 1
    record = run(settings, variant, 0, made_up(), None)
    assert record["cost"]["slots"] == 4 * 32 / 4
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json", run_record(settings, variant, 0, None)) == record


def test_a_changed_source_is_another_router(module):
    name = f"{module(UNCOUNTED)}:Router"
    before = source_digest(name)
    assert source_digest(name) == before
    module(UNCOUNTED + "\n# changed")
    assert source_digest(name) != before
    assert source_digest("math:sqrt") == source_digest("builtins:len")  # both have no source


def test_styles_are_apart():
    names = [None, *ROUTERS, "package.module:HashRouter"]
    assert len({style(name).title for name in names}) == len({style(name).color for name in names}) == 8
    assert len({style(name).marker for name in names}) == 8
    own = style("package.module:HashRouter")
    assert own.title == "HashRouter" and own == style("package.module:HashRouter")


def test_figures_of_an_own_router():
    own = {**made_up_variant("soft"), "name": "Mine", "label": "Mine", "router": "a:Mine", "capacity_factor": None}
    runs = [made_up_run(made_up_variant(None)), made_up_run(made_up_variant("soft")), made_up_run(own)]
    figure = figures.figure_1(runs)
    (legend,) = figure.legends
    assert "Mine" in [text.get_text() for text in legend.get_texts()]
    (line,) = [line for line in figure.axes[0].lines if line.get_gid() == "Mine"]
    assert (line.get_marker(), line.get_color()) == (style("a:Mine").marker, style("a:Mine").color)

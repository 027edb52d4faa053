"""The study's report: complete, self-contained, and safe from markup in labels."""

import base64
import re
from html.parser import HTMLParser

import pytest
import torch
from records import run, study, variant

from vmoe_routers.study import figures, report
from vmoe_routers.study.summary import chance_accuracy, summarise

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(autouse=True)
def one_figure(request, monkeypatch):
    """Reduces the figures to one, because drawing takes most of the time. Only one test checks all figures."""
    if request.node.name != "test_holds_everything":
        monkeypatch.setattr(figures, "_FIGURES", figures._FIGURES[:1])


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(figures, "_FIGURES", ())


def write(folder, runs, settings=None):
    path = report.write_report(folder, runs, settings or {"data": "digits", "command": "study --seeds 3"})
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_holds_everything(tmp_path):
    runs = study(seeds=2, transfer=True)
    _, page = write(tmp_path, runs)
    for row in summarise(runs):
        assert row.label in page.text and f"{100 * row.accuracy.mean:.1f} ±" in page.text
    for words in ("study --seeds 3", "digits", "A <fast> one", "2024-02-29", "not reproduce", "Figure 3", "entropy"):
        assert words in page.text
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    for name, source in zip(("figure_1", "figure_2", "forest", "figure_3", "figure_load"), images, strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / f"{name}.png").read_bytes()
    bars = [tag for tag, _ in page.tags if tag == "rect"]
    assert len(bars) == 10 * 2 * 8  # variants, layers, experts


def test_loads_nothing_and_runs_nothing(tmp_path):
    text, page = write(tmp_path, [run(variant(None)), run(variant("soft"))])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attrs in page.tags:
        assert not any(key.startswith("on") for key in attrs)
        assert attrs.get("src", "data:").startswith("data:")
        assert "href" not in attrs or tag == "a"
    assert not re.search(r"url\(|@import", text)


def test_escapes(tmp_path):
    hostile = '<script>alert("1")</script>&amp;\'$x_{'
    label = {**variant("soft"), "label": hostile}
    text, page = write(tmp_path, [run(label), run(variant(None))], {hostile: hostile, "command": hostile})
    assert "<script" not in text
    assert page.text.count(hostile) >= 5  # name and value of a setting, command, both tables


def test_findings_claim_no_more_than_the_numbers():
    dense, soft, expert = variant(None), variant("soft"), variant("softmax_expert_choice")
    runs = [run(v, seed) for seed in range(3) for v in (dense, soft, expert)]
    # The dense loss is 1.0. Soft is clearly below. Expert Choice is below in the mean, but not for every seed.
    for r in runs:
        losses = {
            "dense": 1.0,
            "soft-c1": 0.7 + 0.01 * r["seed"],
            "softmax_expert_choice-c1": [0.9, 0.7, 1.2][r["seed"]],
        }
        r["final"]["loss"] = losses[r["variant"]["name"]]
    said = "\n".join(report.findings(runs))
    assert "Lowest mean loss: Soft MoE, 0.710 ± 0.006." in said
    assert "Not clearly above the lowest loss at 95 %, seed by seed: Softmax Expert Choice." in said
    assert "clearly below the dense ViT's, at 95 %: Soft MoE. Above it: none." in said
    assert "Not resolved against the dense ViT: 1 of 2." in said


def test_the_best_model_is_one_with_all_seeds():
    dense, soft = ([run(of, seed) for seed in range(3)] for of in (variant(None), variant("soft")))
    for record in dense + soft:
        record["final"] = {"accuracy": 0.9 - 0.1 * record["seed"], "loss": 1.0 + record["seed"]}
    said = report.findings(dense + soft[:1])  # the mean of Soft MoE is better, because its one seed is the best one
    assert said[0].startswith("Lowest mean loss of the models with 3 seeds: Dense ViT, 2.000 ± 0.577.")
    assert "Highest mean accuracy: Dense ViT" in said[0]
    assert report.findings(dense + soft)[0].startswith("Lowest mean loss: Dense ViT")


def test_findings_say_if_only_ablations_are_finished(tmp_path):
    changed = variant("soft") | {"name": "x", "ablation": "soft_scale", "arm": "1"}
    assert report.findings([run(changed)]) == ["No run of the comparison is finished."]
    page = report.write_report(tmp_path, [run(changed)], {"command": ""}).read_text(encoding="utf-8")
    assert "No run of the comparison is finished." in page and "<h2>Results</h2>" not in page


def test_findings_are_short():
    said = report.findings(study(seeds=5, capacities=(0.5, 1.0, 2.0)))
    assert max(map(len, said)) < 450 and any(re.search(r" and \d+ more\.", sentence) for sentence in said)


def test_a_run_that_diverged_is_named():
    runs = study(seeds=2)
    assert not any("iverged" in sentence for sentence in report.findings(runs))
    runs[3]["diverged"] = "step 7: loss was not finite"
    assert f"Diverged: {runs[3]['variant']['label']}, seed 1." in report.findings(runs)[0]


def test_findings_name_models_that_learned_nothing():
    chance = chance_accuracy(torch.tensor([0] * 20 + [1] * 80))
    assert chance == pytest.approx(0.8 + 2 * 0.04)
    runs = [run(v, seed) for seed in range(2) for v in (variant(None), variant("soft"))]
    assert "Nothing was learned" not in "\n".join(report.findings(runs, chance) + report.findings(runs))
    for r, accuracy in zip(runs, (0.9, 0.88, 0.9, 0.87), strict=True):
        r["final"]["accuracy"] = accuracy
    said = report.findings(runs, chance)[0]
    assert said.startswith("Nothing was learned by Soft MoE: ") and "(88.0 % or less)" in said
    assert "Nothing was learned by any model: " in report.findings(runs, 0.9)[0]


def test_findings_of_one_seed_compare_nothing():
    said = "\n".join(line for line in report.findings(study(seeds=1)) if "step" not in line)
    assert "One seed" in said and "95 %" not in said and "±" not in said


@pytest.mark.parametrize("runs", [[], [run(variant(None))], [run(variant("soft"))]])
def test_copes_with_little(tmp_path, runs):
    _, page = write(tmp_path / "new", runs, {})
    assert f"{len(runs)} model" in page.text


@pytest.mark.usefixtures("no_figure")
def test_says_where_and_when_the_runs_were_made(tmp_path):
    runs = study(seeds=2)
    _, page = write(tmp_path, runs)
    assert "2 seeds each; 2024-02-29 12:00 UTC to 2024-02-29 12:01 UTC" in page.text
    assert "22 runs, 2024-02-29" in page.text and "Steps timed 2024-02-29 13:00 UTC\n" in page.text
    runs[0] = runs[0] | {"date": "2024-02-29 13:01 UTC"}
    assert "Steps timed 2024-02-29 13:00 UTC, before 1 run of the comparison ended\n" in write(tmp_path, runs)[1].text
    assert "another machine" not in page.text
    for r in runs:
        r["timing"]["machine"] = {"CPU": "the timing's"}
    runs[3]["machine"] = {"CPU": "a second one"}
    _, page = write(tmp_path, runs)
    assert "21 runs, 2024-02-29 12:00" in page.text and "1 run, 2024-02-29" in page.text
    assert "a second one" in page.text and "on another machine" in page.text and "the timing's" in page.text


@pytest.mark.usefixtures("no_figure")
def test_a_narrow_mlp_is_explained(tmp_path):
    assert "usual is 4" in write(tmp_path, study(seeds=1), {"mlp_ratio": 1.0})[1].text
    assert "usual is 4" not in write(tmp_path, study(seeds=1), {"mlp_ratio": 4.0})[1].text


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize(("program", "command"), [
    ("/somewhere/vmoe_routers/__main__.py", "python -m vmoe_routers study --output 'a b'"),
    ("/bin/vmoe-routers", "vmoe-routers study --output 'a b'"),
])  # fmt: skip
def test_names_the_command(tmp_path, monkeypatch, program, command):
    monkeypatch.setattr("sys.argv", [program, "study", "--output", "a b"])
    assert command in write(tmp_path, study(seeds=1), {"data": "digits"})[1].text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "All numbers are from the test images."),
        ({"holdout": 1000}, "Final values are from the test images"),
        ({"holdout": 1000, "choosing": True}, "All numbers are from 1,000 held-out training images."),
    ],
)
def test_says_which_images_were_measured(tmp_path, settings, words):
    text, _ = write(tmp_path, [run(variant("soft"))], settings)
    assert words in text and text.count("test images") <= (not settings.get("choosing"))

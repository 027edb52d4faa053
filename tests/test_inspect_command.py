"""vmoe-routers inspect: the files, the page, and errors in one line."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from vmoe_routers import cli  # noqa: E402
from vmoe_routers.checkpoints import save_pretrained  # noqa: E402
from vmoe_routers.models import upcycle, vit_moe  # noqa: E402
from vmoe_routers.study import kept  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Saved models, photographs of other sizes than the models' input, and a file that is no image."""
    folder = tmp_path_factory.mktemp("inspect")
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
    for router in ("sinkhorn_token_choice", "soft", None):
        options = {} if router is None else {"num_experts": 4}
        save_pretrained(vit_moe(**sizes, router=router, **options), folder / str(router))
    dense = pytest.importorskip("torchvision").models.VisionTransformer(48, 16, 2, 2, 16, 32)
    save_pretrained(upcycle(dense, router="softmax_expert_choice", num_experts=3), folder / "upcycled")
    for name, size in (("a b", (60, 40)), ("<grey>", (33, 90))):
        pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).convert("L" if "grey" in name else "RGB").save(folder / f"{name}.png")
    (folder / "text.jpg").write_text("no image")
    return folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.addresses, self.text = [], re.findall(r"https?://|href=|<script|url\(", text), text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(dict(attrs))


@pytest.mark.parametrize(("model", "names", "explains"), [
    ("sinkhorn_token_choice", ["blocks.1.mlp_load", "blocks.1.mlp_plan"], ["expert error"]),
    ("soft", ["00__grey__blocks.1.mlp_slots", "blocks.1.mlp_load"], ["slots alike"]),
    ("upcycled", ["encoder.layers.encoder_layer_1.mlp_load"], []),
])  # fmt: skip
def test_writes_pictures_and_a_page(place, tmp_path, capsys, model, names, explains):
    output = tmp_path / "new" / "folder"
    stems = ["a b", "<grey>"] if model == "sinkhorn_token_choice" else ["<grey>"]
    images = [str(place / f"{stem}.png") for stem in stems]
    assert cli.main(["inspect", str(place / model), *images, "--output", str(output)]) == 0
    layer = names[-1].removesuffix("_load").removesuffix("_plan")
    names += [
        stem + end
        for stem in (["00_a_b", "01__grey_"] if len(stems) == 2 else ["00__grey_"])
        for end in ("", f"_{layer}_tokens")
    ]
    files = {path.stem: path for path in output.glob("*.png")}
    assert files.keys() == set(names) and len(list(output.iterdir())) == len(files) + 1
    page = Page((output / "index.html").read_text())
    assert not page.addresses
    shown = [base64.b64decode(source["src"].removeprefix("data:image/png;base64,")) for source in page.sources]
    assert sorted(shown) == sorted(path.read_bytes() for path in files.values())
    assert all(source["alt"] and int(source["width"]) < 1200 for source in page.sources)
    assert "&lt;grey&gt;.png" in page.text and "<grey>" not in page.text and "random" not in page.text
    explained = {term for term in ("expert error", "slots alike", "agreement") if f"{term}</dt>" in page.text}
    assert explained == set(explains) and "dead experts</dt>" in page.text
    out = capsys.readouterr().out
    assert layer in out and f"written: {output / 'index.html'} and {len(files)} pictures" in out.replace("\n", " ")


def test_says_that_a_new_model_is_not_trained(place, tmp_path, capsys):
    arguments = ["vit_moe", str(place / "a b.png"), "--output", str(tmp_path), "--image-size", "32"]
    options = "{patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2, num_experts: 2, router: softmax_token_choice}"
    assert cli.main(["inspect", *arguments, "--model-args", options]) == 0
    words = "The weights are random: the model is not trained"
    assert words in capsys.readouterr().out and words in (tmp_path / "index.html").read_text()


def study_with_models(folder, place):
    """A study of two runs, of which it kept one model."""
    (folder / "runs").mkdir()
    for seed, name in enumerate(("soft-c1-seed0-abc", "soft-c1-seed1-def")):
        record = {"variant": {"label": "Soft MoE"}, "seed": seed, "final": {"accuracy": 0.875}}
        (folder / "runs" / f"{name}.json").write_text(json.dumps(record))
    (folder / "runs" / "steps-abc.json").write_text("{}")
    (folder / "study.json").write_text("{}")
    shutil.copytree(place / "soft", folder / "models" / "soft-c1-seed0-abc")
    (folder / "models" / "settings.yaml").write_text("normalization: clip\n")


def test_the_record_of_a_study(place, tmp_path, capsys, monkeypatch):
    study_with_models(tmp_path, place)
    read, original = [], kept.read_record
    monkeypatch.setattr(kept, "read_record", lambda path, wanted: read.append(path) or original(path, wanted))
    record, output = tmp_path / "runs" / "soft-c1-seed0-abc.json", tmp_path / "inspection"
    assert cli.main(["inspect", str(record), str(place / "a b.png"), "--output", str(output)]) == 0
    assert "Run of a study: Soft MoE, seed 0, accuracy 87.5%" in capsys.readouterr().out
    page = (output / "index.html").read_text()
    assert "normalization clip" in page and "random" not in page
    assert read == [record]  # once
    arguments = ["inspect", str(record), str(place / "a b.png"), "--output", str(output), "--normalization", "none"]
    assert cli.main(arguments) == 0
    assert re.search(r"normalization none \(.*settings.yaml, and options\)", (output / "index.html").read_text())


@pytest.mark.parametrize(("model", "words"), [
    ("runs/soft-c1-seed1-def.json",
     "kept no model of this run, models/soft-c1-seed1-def is missing; the study's command with --save-models"),
    ("runs/steps-abc.json", "wanted the record of a run, runs/*-seed*.json"),
    ("study.json", "wanted the record of a run, runs/*-seed*.json"),
    (".", "model '.' is the folder of a study; wanted"),
    ("runs", "model 'runs' is a folder without a model, config.json is missing; wanted"),
    ("models/soft-c1-seed0-abc/config.json", "is a file of a model; wanted its folder, 'models/soft-c1-seed0-abc'"),
])  # fmt: skip
def test_files_and_folders_without_a_model(place, tmp_path, capsys, monkeypatch, model, words):
    study_with_models(tmp_path, place)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", model, str(place / "a b.png")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "words"), [
    ("nope IMAGE", "model 'nope' is no folder"),
    ("vit_mo IMAGE", "did you mean vit_moe?"),
    ("text.jpg IMAGE", "model 'text.jpg' is a file; wanted a folder of save_pretrained"),
    ("None IMAGE", "has no MoE layer; wanted"),
    ("vit_tiny_patch16_224 IMAGE", "has no MoE layer; wanted"),
    ("soft text.jpg", "text.jpg: cannot be read: cannot identify image file"),
    ("soft IMAGE missing.jpg", "missing.jpg: no such file"),
    ("soft IMAGE .", ".: is a folder, wanted image files: inspect MODEL IMAGE ..."),
    ("--model soft IMAGE", "--model is no option; model is a positional argument: inspect MODEL IMAGE"),
    ("soft IMAGE --image-size 30", "--image-size 30 is not a multiple of the patch size, 8 x 8"),
    ("soft IMAGE --normalization grey", "--normalization must be one of none, inception"),
    ("soft IMAGE --output text.jpg", "--output 'text.jpg' cannot be made"),
    ("soft", "missing: IMAGE "),
    ("", "missing: MODEL, IMAGE "),
    ("soft" + 65 * " IMAGE", "images must be 1 to 64 files, got 65"),
    ("upcycled IMAGE --image-size 32", "upcycled"),
])  # fmt: skip
def test_errors_are_one_line(place, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(place)
    before = sorted(Path().iterdir())
    assert cli.main(["inspect", *("a b.png" if word == "IMAGE" else word for word in arguments.split())]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(Path().iterdir()) == before

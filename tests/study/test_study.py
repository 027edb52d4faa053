"""A whole study: the runs that are started, kept and written."""

import csv
import io
import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from vmoe_routers.study import Settings, Variant, figures, run_study, study, variants
from vmoe_routers.study.images import load_images
from vmoe_routers.study.records import write_record
from vmoe_routers.study.runs import run
from vmoe_routers.study.timing import time_steps
from vmoe_routers.study.workers import Workers

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Settings(
    routers=["softmax_expert_choice", "soft"], capacity_factors=[0.5, 1.0], seeds=2, epochs=1, max_images=40,
    width=16, depth=2, heads=2, num_experts=4, group_size=4, batch_size=16,
)  # fmt: skip


class Stop:
    """Runs jobs in this process, one after another; raises KeyboardInterrupt after a given number of jobs."""

    def __init__(self):
        self.done, self.after = [], None

    def __call__(self, settings, jobs, timing, workers, console):
        data, transfer = load_images(settings)
        for job in jobs:
            if len(self.done) == self.after:
                raise KeyboardInterrupt
            write_record(job.path, run(settings, job.variant, job.seed, data, transfer))
            self.done.append((job.variant, job.seed))
        if timing is not None:
            write_record(timing.path, time_steps(settings, timing.variants, data))
            self.done.append("timing")


@pytest.fixture
def here(monkeypatch):
    stop = Stop()
    drawn = [figure for figure in figures._FIGURES if figure[0] in ("figure_1", "figure_2")]  # drawing takes long
    monkeypatch.setattr(figures, "_FIGURES", drawn)
    monkeypatch.setattr(study, "run_all", stop)
    return stop


def silent():
    return Console(file=io.StringIO(), width=120)


def test_interrupted_and_gone_on_with(tmp_path, here):
    settings = replace(TINY, output=tmp_path / "new" / "folder")
    jobs = [(variant, seed) for seed in range(2) for variant in variants(settings)]
    here.after = 6
    with pytest.raises(KeyboardInterrupt):
        run_study(settings, silent())
    assert here.done == jobs[:6]  # all runs of a seed before the next seed
    assert len(list((settings.output / "runs").iterdir())) == 6

    # The same study again, with one broken record.
    (broken,) = settings.output.glob(f"runs/{jobs[2][0].name}-seed0-*.json")
    broken.write_text("[]")
    here.done, here.after = [], None
    console = silent()
    path = run_study(settings, console)
    assert here.done == [jobs[2], *jobs[6:], "timing"]
    assert json.loads(broken.read_text())["variant"]["name"] == jobs[2][0].name
    said = console.file.getvalue()
    assert f"{broken}: no record, the whole is [], wanted a mapping; run again\n" in said
    assert "40 training and 40 test images of 8 x 8, 10 classes" in said
    assert "models: 5 (a dense ViT, and variants of 2 routers), seeds: 2, runs: 10, done before: 5" in said
    assert f"report: {path}" in said.replace("\n", "")

    assert path == settings.output / "report.html"
    report = path.read_text(encoding="utf-8")
    with open(settings.output / "table.csv", newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert set(rows) == {variant.name for variant in variants(settings)}
    for variant in variants(settings):
        assert variant.label in report and rows[variant.name]["seeds"] == "2"
    for name in ("figure_1.png", "figure_1.svg", "figure_1.csv"):
        assert (settings.output / name).stat().st_size

    # A study with fewer routers and seeds finds all its records.
    here.done, console = [], silent()
    run_study(replace(settings, routers=["soft"], seeds=1), console)
    assert here.done == []
    assert (
        "7 records of other settings, seeds, images or versions, which this study does not use"
        in console.file.getvalue()
    )
    with open(settings.output / "table.csv", newline="", encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["dense", "soft-c0.5", "soft-c1"]

    # With another first seed, it finds the records of the seeds that both studies have.
    run_study(replace(settings, routers=["soft"], first_seed=1), silent())
    assert here.done == [(variant, 2) for variant in variants(replace(settings, routers=["soft"]))]
    here.done = []

    # With another router, only its models are trained, and the steps of all models are timed again.
    more = replace(settings, routers=["soft", "sinkhorn_expert_choice"], seeds=1)
    run_study(more, silent())
    assert here.done == [(v, 0) for v in variants(more) if v.router == "sinkhorn_expert_choice"] + ["timing"]


def test_other_images_at_the_same_place_are_run_anew(tmp_path, here, monkeypatch):
    monkeypatch.setattr(figures, "_FIGURES", ())
    settings = replace(TINY, routers=["soft"], capacity_factors=[1.0], seeds=1, output=tmp_path)
    run_study(settings, silent())
    run_study(settings, silent())
    done = [(Variant(), 0), (Variant("soft", 1.0), 0), "timing"]
    assert here.done == done
    data, transfer = load_images(settings)
    changed = replace(data, train_images=1 - data.train_images), transfer
    monkeypatch.setattr(study, "load_images", lambda settings: changed)
    run_study(settings, silent())
    assert here.done == 2 * done


@pytest.mark.parametrize("image_size", [None, 8])
def test_a_size_that_was_not_asked_for_is_told(tmp_path, here, image_size):
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (10, 12), (number, 0, 0)).save(tmp_path / part / name / f"{number}.png")
    here.after = 0  # interrupt before the first run
    settings = replace(TINY, data=str(tmp_path), image_size=image_size, patch_size=4, output=tmp_path / "study")
    console = silent()
    with pytest.raises(KeyboardInterrupt):
        run_study(settings, console)
    words = "images differ in size and are resized to 32 x 32 pixels; --image-size sets another size"
    assert (words in console.file.getvalue().replace("\n", " ")) == (image_size is None)


def test_a_killed_worker_is_told_in_words(tmp_path, monkeypatch):
    class Killed(Workers):
        def submit(self, *args, **kwargs):
            future = Future()
            future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
            return future

    monkeypatch.setattr("vmoe_routers.study.execution.Workers", Killed)
    with pytest.raises(ChildProcessError, match=r"a worker process was killed, .*; finished runs are kept"):
        run_study(replace(TINY, output=tmp_path), silent())


def test_ablations_are_run_last_and_reported(tmp_path, here):
    settings = replace(
        TINY, routers=["soft"], capacity_factors=[1.0], seeds=2, first_seed=3, ablation_seeds=1,
        ablations=["soft_scale"], output=tmp_path,
    )  # fmt: skip
    path = run_study(settings, silent())
    assert here.done.pop() == "timing"
    runs = [(variant.arm, seed) for variant, seed in here.done]
    assert runs == [(None, 3), (None, 3), (None, 4), (None, 4), ("1", 3), ("4", 3)]
    assert "initial scale of Soft MoE" in path.read_text(encoding="utf-8")
    here.done = []
    run_study(settings, silent())
    assert here.done == []


def test_transfer_gives_figure_2(tmp_path, here):
    settings = replace(
        TINY,
        routers=["soft"],
        seeds=1,
        transfer_data="digits",
        max_images=150,
        output=tmp_path / "with [b]brackets[/b]",
    )
    console = Console(file=io.StringIO(), width=200, markup=False)
    path = run_study(settings, console)
    assert (settings.output / "figure_2.png").stat().st_size
    assert f"report: {path}" in console.file.getvalue()


@pytest.mark.parametrize(("changes", "words"), [
    ({"batch_size": 64}, "batch_size 64: 40 training images are less than one batch; wanted for example 16"),
    ({"holdout": 30}, "batch_size 16: 10 training images are less than one batch"),
    ({"patch_size": 3}, "patch_size 3 does not divide images of 8 x 8 pixels"),
    ({"shift": 8}, "shift 8 moves images of 8 x 8 pixels out of the frame"),
    ({"transfer_data": "digits"}, "10-shot transfer needs more than 100 training images for 10 classes, there are 40"),
    ({"transfer_data": "nowhere"}, "no folder 'nowhere'"),
    ({"training": {"rand_augment": "bogus"}}, "training: rand_augment"),
    ({"training": {"optimizer_args": {"speed": 3}}}, "training: optimizer 'adamw' with .*speed"),
    ({"training": {"warmup": 1e9}}, "training: warmup must take at most all 2 steps of the training"),
    ({"training": {"warmup": 3.0}, "epochs": 2, "ablations": ["epochs"]}, "training: ablation epochs, value 1: warmup"),
    ({"training": {"repeats": 3}}, "batch_size must be a multiple of repeats 3 in training, got"),
    ({"training": {"cutmix": 1.0}, "batch_size": 15, "group_size": 5}, "batch_size must be even for mixup and cutmix"),
])  # fmt: skip
def test_refuses_before_anything_is_run(tmp_path, here, changes, words):
    with pytest.raises(ValueError, match=words):
        run_study(replace(TINY, output=tmp_path / "study", **changes), silent())
    assert here.done == [] and not (tmp_path / "study").exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"batch_size": 30, "group_size": 8}, "batch_size 30 must be a multiple of group_size 8"),
    ({"group_size": 0}, "group_size"),
    ({"seeds": 0}, "seeds must be at least 1 and at most 10000, got 0"),
    ({"ablation_seeds": 0}, "ablation_seeds must be at least 1 and at most 10000, got 0"),
    ({"first_seed": -1}, "first_seed must be at least 0 and at most 2147483647, got -1"),
    ({"epochs": -1}, "epochs must be at least 1"),
    ({"max_images": 0}, "max_images must be at least 1"),
    ({"image_size": -8}, "image_size must be at least 1"),
    ({"routers": ["soft", "hard"]}, "routers: 'hard' is none of softmax_token_choice, "),
    ({"top_k": [1, 9]}, "top_k must be between 1 and num_experts = 8, got 9"),
    ({"top_k": [0]}, "top_k must be between 1"),
    ({"capacity_factors": [1.0, 0.0]}, "capacity_factors must be positive"),
    ({"capacity_factors": [float("inf")]}, "capacity_factors must be positive"),
    ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
    ({"device": "gpu"}, "device must be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
    ({"device": "cpu:0"}, "device must be"),
    ({"workers": -1}, "workers must be at least 0"),
    ({"heads": 3}, "width 64 must be a multiple of heads 3"),
    ({"routers": []}, "routers must not be empty"),
    ({"routers": "soft"}, r"routers must be list\[str\], got 'soft'"),
    ({"epochs": "3"}, "epochs must be int, got '3'"),
    ({"top_k": [1.5]}, r"top_k must be list\[int\], got \[1.5\]"),
    ({"learning_rates": {"dense": "fast"}}, r"learning_rates must be dict\[str, float\], got"),
    ({"training": 3}, r"training must be dict\[str, Any\], got 3"),
    ({"data_workers": 1025}, "data_workers must be at least 0 and at most 1024, got 1025"),
    ({"capacity_factors": []}, "capacity_factors must not be empty"),
    ({"data": ""}, "data must not be empty"),
    ({"scale_init": float("nan")}, "scale_init must be finite"),
    ({"depth": 10**30}, "depth must be at least 1 and at most"),
    ({"holdout": -1}, "holdout must be at least 0"),
    ({"choosing": True}, "choosing measures held-out images, and holdout is 0"),
    ({"ablations": ["colour"]}, "ablations: 'colour' is none of learning_rate, "),
    ({"moe_blocks": "first_half"}, "moe_blocks is 'first_half', wanted"),
    ({"moe_blocks": "last_9"}, "moe_blocks"),
    ({"training": {"colour": 1}}, "training: no option 'colour'; there are accumulate"),
    ({"training": {"weight_decay": -1.0}}, "training: weight_decay must be at least 0"),
    ({"training": {"hflip": 2}}, r"training: hflip must be in \[0, 1\], got 2"),
    ({"training": {"hflip": "x"}}, "training: hflip must be float, got 'x'"),
    ({"training": {"hflip": True}}, "training: hflip must be float, got True"),
    ({"training": {"clip": []}}, "training: clip must be float"),
    ({"training": {"scale": 3}}, r"training: scale must be tuple\[float, float\] \| None, got 3"),
    ({"training": {"scale": [2, 1]}}, "training: scale must be an interval"),
    ({"training": {"rand_augment": 3}}, r"training: rand_augment must be str \| None, got 3"),
    ({"training": {"head_bias": "x"}}, "training: head_bias must be float, got 'x'"),
    ({"training": {"head_bias": float("inf")}}, "training: head_bias must be finite, got inf"),
    ({"training": {"accumulate": 1.5}}, "training: accumulate must be int, got 1.5"),
    ({"training": {"ema": 0.9}}, "training: no option 'ema'"),
    ({"training": {"accumulate": 3}}, "training: accumulate 3 times group_size 8 must divide batch_size 128"),
    ({"learning_rates": {"hard": 1e-3}}, "learning_rates: 'hard' is none of dense, "),
    ({"learning_rates": {"dense": 0.0}}, "learning_rates: dense must be positive and finite, got 0.0"),
])  # fmt: skip
def test_settings_refuse(changes, words):
    with pytest.raises(ValueError, match=words):
        Settings(**changes)

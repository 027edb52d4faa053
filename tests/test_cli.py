"""The command line: options, one-line errors, Ctrl-C, and a study run as users run it."""

import contextlib
import inspect
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from vmoe_routers import __version__, cli, info
from vmoe_routers.study import Settings, figures
from vmoe_routers.study.recipes import fashion
from vmoe_routers.training import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")

# Six runs of less than a second
TINY = (
    "--routers soft --seeds 3 --epochs 6 --width 16 --depth 2 --heads 2 --num-experts 4 --group-size 4 --batch-size 16"
)


@pytest.mark.parametrize(("arguments", "changes"), [
    ("", {}),
    ("--routers soft", {"routers": ["soft"]}),
    ("--routers soft,softmax_expert_choice", {"routers": ["soft", "softmax_expert_choice"]}),
    ('--routers ["soft","softmax_expert_choice"]', {"routers": ["soft", "softmax_expert_choice"]}),
    ("--routers=[soft]", {"routers": ["soft"]}),
    ("--top-k 2 --capacity-factors .5,1", {"top_k": [2], "capacity_factors": [0.5, 1.0]}),
    ("--top_k=1,2,4 --capacity_factors=2", {"top_k": [1, 2, 4], "capacity_factors": [2.0]}),
    ("--data a-b/c_d --output=x-y=z", {"data": "a-b/c_d", "output": Path("x-y=z")}),
    ("--transfer-data digits --plan-combine false", {"transfer_data": "digits", "plan_combine": False}),
    ("--plan-combine --width 32", {"plan_combine": True, "width": 32}),
    ("--image-size 14 --max_images 2000 --learning-rate 1e-3",
     {"image_size": 14, "max_images": 2000, "learning_rate": 1e-3}),
])  # fmt: skip
def test_options(arguments, changes):
    name, target, options = cli._parse(["study", *arguments.split()])
    assert [options.pop(key) for key in ("recipe", "compare", "report")] == [None] * 3
    assert (name, target) == ("study", Settings) and Settings(**options) == Settings(**changes)


def test_a_recipe_sets_the_defaults_of_study():
    for arguments in ("--recipe fashion --seeds 2", "--seeds 2 --recipe=fashion"):
        _, _, options = cli._parse(["study", *arguments.split()])
        assert [options.pop(key) for key in ("recipe", "compare", "report")] == ["fashion", None, None]
        assert Settings(**options) == replace(fashion(), seeds=2)
    _, _, options = cli._parse(["study", "--compare", "a", "b"])
    assert options["compare"] == ["a", "b"]


def test_options_of_convert():
    name, target, options = cli._parse(["convert", "P", "f", "--router", "soft", "--top-k", "3", "--group-size=4"])
    assert (name, target.__name__, options["folder"]) == ("convert", "convert", "f") and "progress" not in options
    assert (options["router"], options["top_k"], options["group_size"]) == ("soft", 3, 4)


@pytest.mark.parametrize(("arguments", "words"), [
    ("study --routers hard", "--routers: 'hard' is none of softmax_token_choice"),
    ("study --data nowhere", "no folder 'nowhere'"),
    ("study --recipe cake", "--recipe 'cake' does not exist; there are digits, fashion"),
    ("study --recipe fasion", "did you mean fashion?"),
    ("study --routers sotf", "did you mean soft?"),
    ("train --router sotf", "did you mean soft?"),
    ("train --router soft --top-k 2", "no option 'top_k' (softmax_token_choice, sinkhorn_token_choice have it)"),
    ("convert a b --router sotf", "did you mean soft?"),
    ("study --compare a", "compare"),
    ("study --compare a b", "a: holds no study, study.json is missing"),
    ("study --report a", "a: holds no study, study.json is missing"),
    ("study --ablations colour", "--ablations: 'colour' is none of learning_rate"),
    ("study --batch-size 30", "--batch-size 30 must be a multiple of --group-size 8"),
    ("study --batch_size 30", "--batch_size 30 must be a multiple of --group-size 8"),
    ("study --seeds many", "--seeds must be a whole number, got many"),
    ("study --width=1.5", "--width must be a whole number, got 1.5"),
    ("study --plan-combine maybe", "--plan-combine must be true or false, got maybe"),
    ("study --top-k one", "--top-k must be a whole number, got one"),
    ("study --colour red", "no option --colour"),
    ("study --device cuda", "--device 'cuda': torch finds no CUDA device"),
    ("study --device cpu:x", "--device must be 'cpu', 'cuda' or 'cuda:N', got 'cpu:x'"),
    ("study --max-images 200 --output /dev/null/x", "/dev/null/x"),
    ("study --capacity_factors 1e308", "--capacity_factors must be positive and at most 10000, got [1e+308]"),
    ("study --capacity-factors 1,1e9", "--capacity-factors must be positive and at most 10000"),
    ("study --capacity-factors 1,1.00000001", "--capacity-factors [1.0, 1.00000001] must differ in their first six"),
    ("study --capacity-factors .nan", "--capacity-factors must be positive"),
    ("study --image_size 1000000", "--image_size 1000000: Soft MoE needs at least"),
    ("study --image-size 800", "--image-size 800: "),
    ("study --width 1000000", "--width 1000000: "),
    ("study --mlp_ratio 1e12", "--mlp_ratio 1000000000000.0: "),
    ("study --num_experts 10000000 --capacity_factors 10000", "--num_experts 10000000: "),
    ("study --depth 100000000", "--depth 100000000: "),
    ("study --heads 1000000 --width 1000000", "1000000: "),
    ("study --width 99999999999999999999", "--width must be at least 1 and at most 2147483647"),
    ("study --mlp-ratio 1e-9", "--mlp-ratio 1e-09 times --width 64 is less than 1"),
    ("study --mlp-ratio .nan", "--mlp-ratio must be positive and finite, got nan"),
    ("study --seeds 1000000000", "--seeds must be at least 1 and at most 10000"),
    ("study --epochs 1000000000", "--epochs must be at least 1 and at most 1000000"),
    ("study --shift 1000000", "--shift 1000000 moves images of 8 x 8 pixels out of the frame"),
    ("study --patch-size 3", "--patch-size 3 does not divide images of 8 x 8 pixels"),
    ("study --batch-size 2048", "--batch-size 2048: 1437 training images are less than one batch"),
    ("study --workers 1000000", "--workers 1000000: each needs at least"),
    ("study --routers=", "--routers must not be empty"),
    ("study --routers []", "--routers must not be empty"),
    ("study --top-k []", "--top-k must not be empty"),
    ("study --output=", "--output must not be empty"),
    ("study --data= --seeds 1", "--data must not be empty"),
    ("convert", "missing: SOURCE, FOLDER"),
    ("convert nowhere folder", "nowhere.index: no such file"),
    ("convert nowhere folder --img_size 0", "--img_size must be at least 1"),
    ("convert nowhere folder --img-size x", "--img-size must be a whole number, got x"),
    ("convert nowhere folder --capacity-factor 1e308", "--capacity-factor must be positive and at most 10000"),
    ("convert nowhere folder --router=", "--router must not be empty"),
    ("eval", "model"),
    ("eval --model nope", "--model 'nope' is no folder"),
    ("eval --model vit_moe --batch-size x", "--batch-size must be a whole number, got x"),
    ("eval --model vit_moe --benchmark --batch_size 0", "--batch_size must be at least 1, got 0"),
    ("eval --model vit_moe --model_args x", "--model_args must be values by name, got x"),
    ("fewshot --model vit_moe --shots 1,0", "--shots must be at least 1, got [1, 0]"),
    ("fewshot --model vit_moe --probe knn", "--probe must be ridge or linear, got 'knn'"),
    ("teach", "no command 'teach'; there are study, train"),
    ("trian", "no command 'trian'; did you mean train?"),
    ("--verion", "no option --verion; did you mean --version?"),
    ("--colour red", "no command 'red'; there are study"),
    ("info --colour red", "no option --colour"),
    ("study --rooters soft", "no option --rooters; did you mean --routers?"),
    ("study --repots A", "no option --repots; did you mean --report?"),
    ("study photos", "'photos' follows no option; did you mean --data photos?"),
    ("study --seeds", "--seeds needs a value"),
    ("eval --model vit_moe runs", "'runs' follows no option; did you mean --model runs?"),
])  # fmt: skip
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vmoe_routers.study.study.run_all", None)  # nothing is run
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_refused(arguments.split(), words, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "words"), [
    (["study", "--data", ""], "--data must not be empty"),
    (["study", "--output", "", "--seeds", "1"], "--output must not be empty"),
    (["convert", "", "folder"], "source must not be empty"),
    (["convert", "--top-k", "1", "P", ""], "folder must not be empty"),
    (["study", "--output", "\udcff"], "is not valid UTF-8"),
])  # fmt: skip
def test_arguments_that_are_no_text(capsys, arguments, words):
    check_refused(arguments, words, capsys)


def trained_with(monkeypatch, *arguments):
    """Returns the settings with which the arguments start a training."""
    started = []
    monkeypatch.setattr("vmoe_routers.training.train", lambda settings, **options: started.append((settings, options)))
    assert cli.main(["train", *arguments]) == 0
    ((settings, options),) = started
    return settings, options


def test_train_takes_recipe_file_and_flags_in_this_order(monkeypatch, tmp_path):
    settings, options = trained_with(monkeypatch)
    assert settings.data == "digits" and settings.router == "soft" and options == {"dry_run": False}
    file = tmp_path / "own.yaml"
    file.write_text("recipe: photos\nepochs: 7\nmixup: 0.5\nscale: [0.2, 0.9]\n")
    settings, options = trained_with(
        monkeypatch, "--config", str(file), "--mixup", "0.1", "--data", "photos", "--ratio", "1,2", "--dry-run"
    )
    assert options == {"dry_run": True} and settings.model == "soft_moe_small_patch16_224"
    assert (settings.epochs, settings.mixup, settings.scale, settings.ratio) == (7, 0.1, (0.2, 0.9), (1.0, 2.0))
    resolved = tmp_path / "settings.yaml"
    resolved.write_text(yaml.safe_dump(settings.to_dict()))
    assert trained_with(monkeypatch, "--config", str(resolved))[0] == settings


@pytest.mark.parametrize(
    ("data", "recipe"),
    [("digits", "digits"), ("torchvision:CIFAR10", "small"), ("torchvision:Food101", "photos"), ("folder", "photos")],
)
def test_train_chooses_the_recipe_for_the_size_of_the_images(monkeypatch, data, recipe):
    settings, _ = trained_with(monkeypatch, "--data", data)
    assert settings.model_args == RECIPES[recipe]().model_args and settings.model == RECIPES[recipe]().model


def test_train_fits_the_recipe_to_another_router(monkeypatch):
    settings, _ = trained_with(monkeypatch, "--router", "softmax_expert_choice", "--model_args.depth", "2")
    assert "slots_per_expert" not in settings.model_args and settings.model_args["depth"] == 2
    assert settings.model_args["embed_dim"] == 64


def test_train_keeps_the_recipes_architecture_for_its_own_model(monkeypatch):
    arguments = "--model", "vit_tiny_patch16_224", "--upcycle", "soft", "--model_args.depth", "2"
    settings, _ = trained_with(monkeypatch, *arguments)
    assert settings.model_args == {"depth": 2} and settings.upcycle == "soft"
    assert settings.router is settings.num_experts is settings.group_size is None
    assert settings.shift == 1  # the recipe is still the recipe for digits


@pytest.mark.parametrize("recipe", RECIPES)
def test_train_takes_every_recipe_unchanged(monkeypatch, recipe):
    settings, _ = trained_with(monkeypatch, "--recipe", recipe)
    assert settings == RECIPES[recipe]()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--recipe", "cake"], "--recipe 'cake' does not exist; there are digits"),
    (["--config", "nowhere.yaml"], "--config 'nowhere.yaml': No such file"),
    (["--conf", "own.yaml"], "no option --conf; did you mean --config?"),
    (["--rec=small"], "no option --rec; did you mean --recipe?"),
    (["--scale", "0.5"], "--scale must be 2 values with commas between them, got [0.5]"),
    (["--ratio", "1"], "--ratio must be 2 values with commas between them, got [1]"),
    (["--model-args", "{num_classes: 5}"], "--model-args must not have 'num_classes', which comes from the data"),
    (["--model-args", "{depth: 1000000000, patch_size: 2}"], "depth must be in [1, 10000], got 1000000000"),
    (["--mixup", "0.5", "--batch-size", "33"], "--batch-size 33 must be a multiple of 2, because --mixup and --cutmix"),
    (["--capacity-factor", "1e9"], "--capacity-factor must be positive and at most 10000, got 1000000000.0"),
    (["--router", "nowhere:factory"], "--router: 'nowhere:factory' cannot be imported"),
    (["--data", "hf:"], "hf:: wanted the name of a data set"),
    (["--output", "/dev/null/x"], "--output '/dev/null/x' cannot be made"),
    (["--epochs", "many"], "--epochs must be a whole number, got many"),
    (["--epochs", "0"], "--epochs must be at least 1"),
    (["--hflip", "null"], "--hflip must be a number, got None"),
    (["--mixup=-1"], "--mixup must be in [0, 1e+06]"),
    (["--model-args", "{depth: 1, depth: 2}"], "--model-args: depth is given twice"),
    (["--optimizer-args={lr: 1}"], "--optimizer-args must not have 'lr', which the option --learning-rate sets"),
    (["--keep", "some"], "--keep must be a list of last, best, every"),
    (["--data", "nowhere"], "no folder 'nowhere'"),
    (["--learning-rate", "0"], "--learning-rate must be positive"),
])  # fmt: skip
def test_train_refuses(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_refused(["train", *arguments], words, capsys)


def test_train_refuses_files_with_other_options(capsys, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("epoch: 7\n")
    check_refused(["train", "--config", str(file)], "no option 'epoch'", capsys)
    file.write_text("- 7\n")
    check_refused(["train", "--config", str(file)], "wanted options by name, got list", capsys)
    file.write_text("")
    check_refused(["train", "--config", str(file)], "wanted options by name, got nothing", capsys)
    file.write_text("epochs: null\n")
    check_refused(["train", "--config", str(file)], "--epochs must not be null", capsys)
    file.write_text("epochs: 1\nseed: 2\nepochs: 3\n")
    check_refused(["train", "--config", str(file)], f"{file}, line 3: epochs is given twice", capsys)
    file.write_text("model_args:\n  depth: 1\n  depth: 2\n")
    check_refused(["train", "--config", str(file)], f"{file}, line 3: depth is given twice", capsys)
    file.write_text("7: 1\n")
    check_refused(["train", "--config", str(file)], "wanted options by name, got 7 in place of a name", capsys)


def check_refused(arguments, words, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vmoe-routers: ") and words in err and err.count("\n") == 1 and err.endswith("\n")
    assert out == "" and len(err) < 2100


@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "vmoe-routers: not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory DefaultCPUAllocator"),
    (ValueError("x" * 10_000), "x ..."),
    (ValueError("a\x1b[31mred\nline"), "a [31mred line"),
])  # fmt: skip
def test_errors_of_a_study_are_one_line(capsys, monkeypatch, error, words):
    def fail(settings):
        raise error

    monkeypatch.setattr("vmoe_routers.study.run_study", fail)
    check_refused(["study"], words, capsys)


@pytest.mark.parametrize(("arguments", "words"), [
    (["trian"], "no command 'trian'; did you mean train?"),
    (["eval"], "missing: --model (the options: vmoe-routers eval --help)"),
    (["inspect"], "missing: MODEL, IMAGE (the options"),
    (["inspect", "model"], "missing: IMAGE (the options"),
    (["convert", "source"], "missing: FOLDER (the options"),
])  # fmt: skip
def test_missing_arguments_and_unknown_commands(arguments, words, capsys):
    check_refused(arguments, words, capsys)


def test_a_missing_package_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert cli.main(["study"]) == 2
    err = capsys.readouterr().err
    assert "jsonargparse" in err and "pip install 'vmoe_routers[study]'" in err and err.count("\n") == 1
    assert cli.main(["convert", "source", "folder"]) == 2
    assert "pip install 'vmoe_routers[checkpoints]'" in capsys.readouterr().err
    assert cli.main(["eval", "--model", "vit_moe"]) == 2
    assert "pip install 'vmoe_routers[training]'" in capsys.readouterr().err


def help_of_raw(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


def help_of(arguments, capsys):
    return " ".join(help_of_raw(arguments, capsys).split())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_overview_fits_a_screen_and_needs_no_package(capsys, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"{name} {command.help}" in " ".join(out.split()) for name, command in cli.COMMANDS.items())
    assert len(out.splitlines()) <= 30 and max(map(len, out.splitlines())) <= 80


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vmoe-routers {__version__}\n"


@pytest.mark.parametrize(("built", "words"), [(False, "not built"), (True, "built for 80;90, not loaded: this torch")])
def test_info_needs_no_package_but_torch(capsys, monkeypatch, built, words):
    for package in ("jsonargparse", "rich", "timm", "yaml"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(info, "_C", SimpleNamespace(isa=lambda: "v9", cuda_built=built, cuda_architectures="80;90"))
    monkeypatch.setattr(info, "WITHOUT_CUDA", {"topk"})
    monkeypatch.setattr(info, "package_version", lambda name: None if name == "safetensors" else "1.2")
    assert cli.main(["info"]) == 0
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace("A k", "A_k").splitlines())
    assert found["CUDA_kernels"].startswith(words) and "ISA v9" in found["CPU"]
    assert (found["rich"], found["safetensors"]) == ("1.2", "not installed")
    assert {"torch", "Python", "timm", "datasets"} <= found.keys() and "vmoe-routers" not in found


def test_completion_offers_options_as_the_help_shows_them(capsys):
    script = help_of_raw(["--print-completion", "shtab-bash"], capsys)

    def complete(*words):
        line = (
            f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_vmoe_routers; echo ${{COMPREPLY[*]}}"
        )
        return subprocess.run(["bash"], input=script + line, capture_output=True, text=True, check=True).stdout.split()

    assert complete("vmoe-routers", "''") == list(cli.COMMANDS)
    assert complete("vmoe-routers", "train", "--top") == ["--top-k"]
    assert complete("vmoe-routers", "study", "--rout") == ["--routers"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command(capsys, name):
    command, out = cli.COMMANDS[name], help_of([name, "--help"], capsys)
    assert command.description in out and f"Example: {command.example}" in out
    for key, parameter in inspect.signature(command.load()).parameters.items():
        required = command.positional and parameter.default is inspect.Parameter.empty
        shown = f" {key.upper()} " if required else f" --{key.replace('_', '-')} "
        assert (shown in out) != (key in command.hidden)
    assert not re.search(r"<class|Optional|None|_\w+ [A-Z]|\+ |\(required\) \(|default: \)", out)


def test_help_shows_positional_arguments_in_the_usage(capsys):
    assert "usage: vmoe-routers convert [options] SOURCE FOLDER Conv" in help_of(["convert", "--help"], capsys)
    assert "usage: vmoe-routers inspect [options] MODEL IMAGE ... Draws" in help_of(["inspect", "--help"], capsys)


def test_help_begins_with_the_command_s_own_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = re.findall(r"^  (--[\w-]+) ", capsys.readouterr().out, re.MULTILINE)
    assert shown[:4] == ["--recipe", "--config", "--dry-run", "--data"]
    assert shown.index("--model") < shown.index("--learning-rate") and shown.index("--ep") < shown.index("--hflip")


def test_help_shows_defaults_of_the_recipe(capsys):
    out = help_of(["train", "--recipe", "photos", "--help"], capsys)
    assert (
        "(default: soft_moe_small_patch16_224)" in out
        and "--epochs N passes over the training images. (default: 100)" in out
    )
    assert "--keep TEXT,... checkpoints" in out and '"every" one. (default: last, best)' in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_of_the_help_are_parsed(name):
    _, *arguments = cli.COMMANDS[name].example.split()
    assert cli._parse(arguments)[0] == name


def wait_until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    assert true()


def alone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_ctrl_c_and_the_same_command_again(tmp_path, capfd, monkeypatch):
    for part in ("train", "t10k"):
        header, labels = (
            struct.pack(">4I", 0x803, 200, 8, 8),
            struct.pack(">2I200B", 0x801, 200, *range(10), *[3] * 190),
        )
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + random.Random(part).randbytes(200 * 8 * 8))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    arguments = ["study", "--data", str(tmp_path), "--output", str(tmp_path), "--workers", "1", *TINY.split()]
    records = tmp_path / "runs"
    # The command gets its own session, as in a terminal. Ctrl-C sends a signal to all processes of the session.
    process = subprocess.Popen(
        [sys.executable, "-m", "vmoe_routers", *arguments],
        start_new_session=True,
        # A shell script starts background processes with Ctrl-C ignored, and children inherit this setting.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: list(records.glob("*.json")) or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == 130
        out, err = capfd.readouterr()
        assert err == "" and "interrupted; finished runs are kept" in out and "Traceback" not in out
        wait_until(lambda: alone(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 1 <= len(done) < 6

    monkeypatch.setattr(figures, "_FIGURES", figures._FIGURES[:1])  # drawing takes long
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    assert err == "" and f"runs: 6, done before: {len(done)}" in out
    epochs = 36 - 6 * len(done)
    assert out.count("  acc. ") == 6 - len(done) and f"{epochs}/{epochs} epochs" in out and "28/28 rounds" in out
    assert "Nothing was learned by any model: " in out and "report: " in out and (tmp_path / "report.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in done} == done and len(list(records.glob("*-seed*.json"))) == 6


def start(tmp_path, *arguments, **options):
    """Starts a study in its own session, as in a terminal. Ctrl-C sends a signal to all processes of the session."""
    return subprocess.Popen(
        [sys.executable, "-m", "vmoe_routers", "study", "--output", str(tmp_path / "out"), *TINY.split(), *arguments],
        start_new_session=True,
        # A shell script starts background processes with Ctrl-C ignored, and children inherit this setting.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        # Not measured by coverage, whose import at the start of Python would lose a Ctrl-C.
        env={**{k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def processor_seconds(process):
    """Seconds of processor time that a process has used, from Linux's /proc."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5])
def test_ctrl_c_twice_while_importing(tmp_path, seconds):
    process = start(tmp_path)
    if Path("/proc/self/stat").exists():  # on a loaded machine, 0.3 s may pass before Python runs any code
        wait_until(lambda: process.poll() is not None or processor_seconds(process.pid) >= seconds)
    else:
        time.sleep(seconds)
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=300)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in out and out.count("\n") < 5


def children(process):
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in Linux's /proc")
def test_workers_end_with_a_killed_parent_also_while_they_import(tmp_path):
    began = time.monotonic()
    process = start(tmp_path, "--workers", "2")
    try:
        # The workers are the children that multiprocessing starts. Their imports take seconds.
        def is_worker(child):
            try:
                return b"--multiprocessing-fork" in Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:  # the child has ended
                return False

        wait_until(lambda: sum(map(is_worker, children(process.pid))) == 2 or process.poll() is not None)
        # The imports of a worker take about as long as the imports of the parent took. Wait for a part of this time,
        # until the guard knows the second worker. Then wait less than the remaining time for the end of both workers.
        importing = time.monotonic() - began
        time.sleep(importing / 8)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        wait_until(lambda: alone(process.pid), max(3, importing / 2))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

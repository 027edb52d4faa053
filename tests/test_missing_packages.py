"""Messages of an installation without the optional packages, and with a torchvision that does not fit torch."""

import json
import subprocess
import sys

import parity
import pytest

TINY = str(parity.GOLDEN / "ckpt" / "tiny")

# Use one process, because importing torch takes seconds. {TOP: error} are the packages whose import fails.
CODE = """
import contextlib, io, json, sys
from vmoe_routers.cli import main

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.errors:
            raise self.errors[name.partition(".")[0]]

finder, found = Broken(), []
CONVERT = f"convert {sys.argv[1]} {sys.argv[2]}"
sys.meta_path.insert(0, finder)

def run(errors, *commands):
    finder.errors = errors
    for arguments in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments.split())
        found.append((code, out.getvalue(), err.getvalue()))

def missing(*names):
    return {name: ModuleNotFoundError(f"No module named {name!r}", name=name) for name in names}

optional = missing("jsonargparse", "rich", "timm", "torchvision", "sklearn", "scipy", "matplotlib", "safetensors",
                   "huggingface_hub", "docstring_parser", "PIL", "yaml")
run(optional, "--version", "--help", "", "info", "study", "convert a b", "train")
try:
    import vmoe_routers.models
except ImportError as error:
    found.append((0, str(error), ""))
run(missing("timm"), "study", CONVERT)
broken = RuntimeError("operator torchvision::nms does not exist")
run({"torchvision": broken}, "study --seeds 1", CONVERT)
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("timm")
    done = subprocess.run(
        [sys.executable, "-c", CODE, TINY, str(tmp_path_factory.mktemp("models") / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_optional_packages(results):
    version, help_, nothing, info, *refused = results[:7]
    assert all(code == 0 and err == "" for code, _, err in (version, help_, nothing, info))
    assert version[1].startswith("vmoe-routers ") and "convert" in help_[1] and "CPU kernels" in info[1]
    for (code, out, err), extra in zip(refused, ("study", "checkpoints", "training"), strict=True):
        assert code == 2 and out.strip() == "" and err.count("\n") == 1
        assert f"No module named 'jsonargparse'; pip install 'vmoe_routers[{extra}]'" in err


def test_models_without_timm(results):
    assert "vmoe_routers.models needs timm" in results[7][1] and "pip install timm" in results[7][1]
    for code, out, err in results[8:10]:
        assert code == 2 and out.strip() == "" and err.count("\n") == 1 and "needs timm" in err


def test_a_broken_torchvision_is_one_line(results):
    for code, out, err in results[10:]:
        assert code == 2 and out.strip() == "" and err.count("\n") == 1
        assert "torchvision was built for another torch" in err and "vmoe_routers[" not in err

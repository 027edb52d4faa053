"""No value of an argument makes an op access memory outside its tensors or end the process (`hostile.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile import ROWS

from vmoe_routers import ops


def registered() -> set[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return {"raw." + name.split("::")[1] for name in names if name.startswith("vmoe_routers::")}


def test_every_op_has_a_row():
    assert set(ROWS) == registered() | {f"ops.{name}" for name in ops.__all__}


@pytest.fixture(scope="module")
def report(request) -> dict[str, dict]:
    program = Path(__file__).with_name("hostile.py")
    library = request.config.getoption("--cuda-on-host") or ""
    done = subprocess.run([sys.executable, program, library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ROWS)
def test_no_call_is_fatal(report, name):
    assert report[name]["calls"] > 10
    assert report[name]["fatal"] == []

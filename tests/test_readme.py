"""README's Python runs as it stands, top to bottom."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["output"], torch.Tensor)
    assert names["output"].shape == names["images"].shape
    assert names["images"].grad is not None
    assert capsys.readouterr().out

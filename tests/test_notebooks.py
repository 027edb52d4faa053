"""Every notebook runs from top to bottom. One kernel runs all notebooks, because its imports take seconds."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The warning comes from jupyter's event loop.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookClient]:
    """A client whose kernel runs in a separate folder, beside the kept results."""
    folder = tmp_path_factory.mktemp("copy") / "notebooks"
    folder.mkdir()
    (folder.parent / "results").symlink_to(ROOT / "results")
    # Use sockets in a folder with a short name: another kernel could take a free port before this kernel opens it.
    with tempfile.TemporaryDirectory() as sockets:
        client = NotebookClient(
            nbformat.v4.new_notebook(),
            timeout=600,
            startup_timeout=600,
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
        )
        with client.setup_kernel(cwd=os.fspath(folder)):
            yield client


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, client):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # removes the names of earlier notebooks
    client.nb = notebook
    client.execute(cleanup_kc=False)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_there_is_one():
    assert NOTEBOOKS

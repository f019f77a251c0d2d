"""The notebooks of the documents run from top to bottom, with warnings as errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

_ROOT = Path(__file__).parents[1]
_NOTEBOOKS = sorted((_ROOT / "docs" / "tutorials").glob("*.ipynb"))
# The kernel's own start is not ours to judge; what the notebook does is.
_STRICT = "import warnings; warnings.simplefilter('error'); import torch; torch.set_num_threads(1)"


def test_there_are_notebooks():
    assert len(_NOTEBOOKS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    if "compression" in path.read_text():
        pytest.importorskip("torch_pruning")
    pytest.importorskip("matplotlib")
    # The kernel sees the package under test, wherever its own folder is.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(_ROOT), os.getenv("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    strict, lax = map(nbformat.v4.new_code_cell, (_STRICT, "warnings.simplefilter('default')"))
    notebook.cells = [strict, *notebook.cells, lax]
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}})
    done = client.execute()
    printed = [out for cell in done.cells for out in cell.get("outputs", [])]
    assert not [out.text for out in printed if out.get("name") == "stderr"]
    assert any("image/png" in out.get("data", {}) for out in printed)


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    """What is shown is made when the site is built, so it cannot be out of date."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)

"""The notebook runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_first_hour_takes_less_than_two_minutes_and_draws_its_plots():
    nbformat = pytest.importorskip("nbformat", reason="the extra octavo[test] is not installed")
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "first-hour.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(ROOT / "docs"))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not [output for output in outputs if output.output_type == "error"]


def test_the_notebook_is_kept_without_outputs():
    """They would be out of date with the next change, and make every difference unreadable."""
    import json

    cells = json.loads((ROOT / "docs" / "first-hour.ipynb").read_text(encoding="utf-8"))["cells"]
    assert cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)

"""The notebook `examples/tour.ipynb` runs from the first cell to the last."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_tour_runs_and_shows_images(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    # runs and data of the test stay out of the checkout
    for cell in notebook.cells:
        cell.source = cell.source.replace('ROOT / "outputs" / "tour"', f'Path("{tmp_path}")')
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output["data"] for output in shown) == 4
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    strict = {
        line.split()[0]: int(line.split("strict ")[1].split()[0])
        for line in printed.splitlines()
        if "strict" in line
    }
    assert strict["shipped"] >= 18 and strict["100"] <= 6

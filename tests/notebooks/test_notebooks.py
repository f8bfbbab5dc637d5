"""Every notebook runs from start to end as it is, shows what it promises, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
import torch
from diffusers import DiffusionPipeline
from nbclient import NotebookClient

from psa_diffusers import demo

from ..cli.tiny_wan import save_model

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"quickstart": 1, "how_it_works": 6, "choosing_a_budget": 3}


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def shown(notebook, kind: str) -> list[str]:
    """What the cells put out of one MIME type."""
    outputs = [output for cell in code_cells(notebook).values() for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def printed(notebook, cell: str) -> str:
    return "".join(item.text for item in code_cells(notebook)[cell].outputs if item.get("name") == "stdout")


def test_all_are_known():
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    """Nor does anything else change by running: no counts, no times, no version of a kernel."""
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {} and len(cell.source.splitlines()) <= 20
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert json.loads(path.read_text(encoding="utf-8"))["nbformat_minor"] >= 5, "cells have ids from 4.5 on"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    linked = {name for name in text.replace("(", " ").replace(")", " ").split() if name.endswith(".ipynb")}
    assert linked <= {other.name for other in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cell_for_wan_loads_another_model(path, tmp_path):
    """The switch is off; turned on, it needs nothing but what the cells before it import."""
    code = code_cells(read(path))["wan"].source
    assert code.startswith("USE_WAN = False")
    model = save_model(tmp_path / "tiny", vocabulary=False)
    larger = {"USE_WAN = False": "USE_WAN = True", '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': repr(str(model))}
    for large, small in {**larger, "bfloat16": "float32", '"cuda"': '"cpu"'}.items():
        code = code.replace(large, small)
    scope = {"torch": torch, "DiffusionPipeline": DiffusionPipeline}
    exec(compile(code, path.name, "exec"), scope)
    assert type(scope["pipe"]).__name__ == "WanPipeline" and scope["run"]["num_frames"] == 81


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a notebook; an exception in a cell is one here."""
    try:
        demo.model_folder()
    except FileNotFoundError:
        pytest.skip("the trained model is not in this checkout")

    def run(name: str):
        notebook, folder = read(FOLDER / f"{name}.ipynb"), tmp_path_factory.mktemp(name)
        place = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=place).execute()
        assert not list(folder.iterdir()), "a notebook leaves nothing behind"
        assert len(shown(notebook, "image/png")) == PICTURES[name]
        return notebook

    return run


def test_quickstart(run):
    notebook = run("quickstart")
    assert any("<video" in text for text in shown(notebook, "text/html"))
    ratio = float(printed(notebook, "closeness").split()[1])
    assert ratio > 20, "PSNR in dB of the sparse video"
    assert "compute budget of the sparse calls 0.150" in printed(notebook, "statistics")
    steps, layers = (text.splitlines()[2:] for text in shown(notebook, "text/markdown"))
    assert [row.split(" | ")[1] for row in steps] == ["dense"] * 2 + ["sparse"] * 4
    assert len(layers) == 5 and all("dense warm-up (4)" in row for row in layers)
    assert shown(notebook, "text/plain")[-1] == "'WanAttnProcessor'"


def test_how_it_works(run):
    notebook = run("how_it_works")
    losses, layers = (text.splitlines()[2:] for text in shown(notebook, "text/markdown"))
    cost, error = ({row.split(" | ")[0].strip("| "): float(row.split(" | ")[i]) for row in losses} for i in (1, 2))
    assert list(cost) == ["full", "2x", "4x", "8x", "centroid", "the plan"]
    assert cost["8x"] < cost["the plan"] < cost["4x"] and error["the plan"] < error["2x"]
    assert len(layers) == 10


def test_choosing_a_budget(run):
    """The default has the least error of all presets, at the least budget; calibrated budgets are closer still."""
    notebook = run("choosing_a_budget")
    (table,) = shown(notebook, "text/markdown")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    errors = {name: float(error) for name, error, _ in rows}
    assert min(errors, key=errors.get) == "default"
    assert "compute_budget=0.2" in printed(notebook, "calibrate")
    expected, uniform = (float(text.split()[-1]) for text in printed(notebook, "tune").split(","))
    assert expected < uniform
    runs = [line.replace(",", "").split() for line in printed(notebook, "tuned").splitlines()]
    assert [run[-1] for run in runs] == ["0.150", "0.150"]
    one, tuned = (float(run[run.index("PSNR") + 1]) for run in runs)
    assert min(one, tuned) > 20  # which is ahead, the notebook leaves to the comparison

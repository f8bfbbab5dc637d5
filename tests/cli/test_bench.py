"""psa-bench: what it measures, writes and refuses."""

import csv
import json

import pytest
import torch

from psa_diffusers.benchmark import SHAPES, BenchCase, grid_of, measure
from psa_diffusers.cli.bench import app
from psa_diffusers.cli.errors import run_command
from psa_diffusers.config import PSAConfig

SMALL = ["--grid", "2x8x16", "--heads", "2", "--head-dim", "32", "--repeats", "2", "--quiet"]


def run(*arguments):
    return run_command("psa-bench", app, [*SMALL, *arguments])


def test_json_rows(capsys):
    assert run("--compute-budget", "0.2,0.5", "--dtype", "float32,bfloat16", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["compute_budget"], row["dtype"]) for row in rows] == [
        (0.2, "float32"),
        (0.5, "float32"),
        (0.2, "bfloat16"),
        (0.5, "bfloat16"),
    ]
    for row in rows:
        assert row["tokens"] == 256
        assert row["backend"] == "torch"
        assert abs(row["achieved_budget"] - row["compute_budget"]) < 0.1
        assert row["speedup"] == pytest.approx(row["dense_median"] / row["sparse_median"])
        assert row["plan_p20"] <= row["plan_median"] <= row["plan_p80"] < row["sparse_p80"]
        assert row["torch"] == torch.__version__
    assert rows[1]["relative_error"] < rows[0]["relative_error"] < 1


def test_text_is_read_in_full_and_rivals_are_named():
    row = measure(BenchCase((2, 8, 16), PSAConfig(), heads=1, head_dim=32, text_tokens=70), repeats=1)
    assert row["dense_backend"] == "sdpa" and json.loads(row["rivals"]) == {
        "sdpa": pytest.approx(row["dense_median"], rel=1e-4)
    }
    assert row["achieved_budget"] > 0.5  # 70 text tokens make two of six blocks full, as rows and as columns


def test_shapes_have_the_tokens_of_their_models():
    tokens = {name: BenchCase(s.grid, PSAConfig(), text_tokens=s.text_tokens).tokens for name, s in SHAPES.items()}
    assert tokens == {
        "wan2.1-1.3b-480p": 32760,
        "wan2.1-14b-720p": 75600,
        "cogvideox-5b": 17776,
        "hunyuan-720p": 118800 + 256,
    }


def test_csv_is_appended(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    for _ in range(2):
        assert run("--csv", str(path)) == 0
    assert "256" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert rows[0]["grid"] == "2x8x16"
    assert rows[0]["relative_error"] == rows[1]["relative_error"]


def test_foreign_csv_is_left_alone(tmp_path, capsys):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    assert run("--csv", str(path)) == 2
    assert "other columns" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "2x8"], "FRAMESxHEIGHTxWIDTH"),
        (["--shape", "wan9"], "wan2.1-14b-720p"),
        (["--compute-budget", "1.5"], "compute_budget"),
        (["--compute-budget", "much"], "numbers separated by commas"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--device", "nowhere"], "--device must be"),
        (["--preset", "psa-9"], "no preset 'psa-9'"),
        (["--preset", "psa-3", "--compute-budget", "0.2"], "compute_budget"),
        (["--backend", "fast"], "backend"),
        (["--heads", "0"], "--heads must be at least 1"),
        (["--csv", "no/such/folder/x.csv"], "there is no folder"),
        (["--plot", "no/such/folder/x.png"], "there is no folder"),
        (["--plot", "x.txt"], "--plot must end in"),
        (["--draw-only", "--plot", "x.png"], "--draw-only needs"),
        (["--draw-only", "--csv", "no.csv"], "--draw-only needs"),
        (["--official", "."], "holds no src/psa_triton"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2


@pytest.mark.parametrize("option", [("--csv", "rows.csv"), ("--plot", "rows.png")])
def test_files_that_cannot_be_written_are_refused_before_measuring(option, tmp_path, capsys, monkeypatch):
    from psa_diffusers.cli import bench_output

    monkeypatch.setattr(bench_output.os, "access", lambda path, mode: False)
    monkeypatch.setattr("psa_diffusers.benchmark.measure", lambda *arguments: pytest.fail("measured"))
    assert run(option[0], str(tmp_path / option[1])) == 2
    assert f"cannot write to {tmp_path / option[1]} (Permission denied)" in capsys.readouterr().err


def test_whole_budget_has_no_error():
    config = PSAConfig(compute_budget=1.0)
    assert measure(BenchCase((2, 8, 16), config, heads=1, head_dim=32), repeats=1)["relative_error"] < 1e-5


@pytest.mark.parametrize("tokens", [1, 7, 4096, 8192, 16384, 4608])
def test_grid_of(tokens):
    frames, height, width = grid_of(tokens)
    assert frames * height * width == tokens
    if tokens > 7:
        assert max(height, width) <= 2 * min(height, width)


def test_plot_of_what_was_measured_and_of_a_file(tmp_path, capsys):
    rows, picture, again = tmp_path / "rows.csv", tmp_path / "x.svg", tmp_path / "again.png"
    assert run("--compute-budget", "0.3,0.6", "--csv", str(rows), "--plot", str(picture)) == 0
    assert "ideal: dense x budget" in picture.read_text() or "<svg" in picture.read_text()
    before = rows.read_text()
    assert run("--draw-only", "--csv", str(rows), "--plot", str(again)) == 0
    assert again.read_bytes().startswith(b"\x89PNG") and rows.read_text() == before
    capsys.readouterr()


def test_plot_needs_two_rows_that_belong_together(tmp_path, capsys):
    assert run("--plot", str(tmp_path / "x.png")) == 2
    assert "two lengths at one budget" in capsys.readouterr().err


def test_tables_name_what_was_timed_and_what_not(capsys):
    assert run("--stages", "--naive", "--rounding") == 0
    shown = capsys.readouterr().out
    assert "not timed: naive psa" in shown
    stages = shown.split("256 tokens x 2 x 32, budget 0.1", 1)[1]
    assert ": stages\n" in stages and "attend" in stages


def test_plot_without_matplotlib_says_so_before_measuring(tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    rows = tmp_path / "rows.csv"
    assert run("--csv", str(rows), "--plot", str(tmp_path / "x.png")) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err and not rows.exists()

"""The script that writes down what a run of the tests came to."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "record_tests.py"

TESTS = """
import pytest

def test_passes(): pass

def test_passes_too(): pass

def test_fails(): assert 0

@pytest.fixture
def broken(): raise ValueError

def test_has_an_error(broken): pass

def test_is_skipped(): pytest.skip("here")
"""


STOPS = """
def pytest_runtest_call(item):
    if item.name == "test_fails":
        raise KeyboardInterrupt
"""


@pytest.fixture
def record(tmp_path):
    """Run the script on these tests; returns its exit code and the rows of the table."""
    tests, table = tmp_path / "test_some.py", tmp_path / "runs.csv"
    tests.write_text(TESTS)
    (tmp_path / "stops.py").write_text(STOPS)

    def run(*arguments: str) -> tuple[int, list[dict]]:
        command = [sys.executable, str(SCRIPT), "--csv", str(table), "--", "-q", "-n", "0", str(tests), *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        rows = list(csv.DictReader(table.open())) if table.exists() else []
        return done.returncode, rows

    return run


def test_a_row_a_run(record):
    code, rows = record()
    assert code == 1
    assert [rows[0][name] for name in ("passed", "failed", "skipped")] == ["2", "2", "1"]
    code, rows = record("-k", "passes")
    assert code == 0 and len(rows) == 2
    assert [rows[1][name] for name in ("passed", "failed", "skipped")] == ["2", "0", "0"]
    assert rows[1]["command"].startswith("pytest -q -n 0") and rows[1]["command"].endswith("-k passes")
    assert rows[1]["finished"] == "yes" and rows[1]["commit"] and rows[1]["torch"] and rows[1]["date"]


def test_a_stopped_run_says_so(record):
    code, rows = record("-p", "stops")
    assert code == 2
    assert [rows[0][name] for name in ("passed", "failed", "skipped", "finished")] == ["2", "0", "0", "no"]


def test_no_row_without_tests(record):
    assert record("-k", "nothing_of_the_kind") == (5, [])

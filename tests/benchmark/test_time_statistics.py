"""The cost of statistics: both ways compute the same, one of them counts, and the figures are what they say."""

import csv
import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch

from psa_diffusers.integration import operations

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "time_statistics.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("time_statistics", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture
def tiny(script):
    """A tiny transformer with PSA, its processor, and the arguments of a forward."""
    from argparse import Namespace

    model, inputs, _ = script.load(Namespace(model="tiny", device="cpu", dtype="float32"))
    script.enable_psa(model, script.PSAConfig(dense_warmup=0.0))
    return model, script.installed_processors([model])[0], inputs


def test_row_of_a_tiny_model(script, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    assert script.main(["--model", "tiny", "--repeats", "3", "--csv", str(file)]) == 0
    capsys.readouterr()
    (row,) = csv.DictReader(file.open(newline=""))
    assert (row["blocks"], row["tokens"], row["sparse_calls"], row["backend"]) == ("2", "256", "4", "torch")
    assert row["device_name"] and row["torch"] and float(row["with_ms"]) > 0 and float(row["without_ms"]) > 0
    low, middle, high = (float(row[name]) for name in ("overhead_low", "overhead", "overhead_high"))
    assert low <= middle <= high and 0 < float(row["counting_share"]) < 1


@torch.inference_mode()
def test_without_statistics_the_output_is_the_same_and_nothing_is_counted(script, tiny):
    model, processor, inputs = tiny
    outputs = []
    for statistics in (script.PSAStatistics(), script.NoStatistics(), script.ClockedStatistics()):
        processor.statistics = statistics
        with processor.step(0, 2):
            outputs.append(model(**inputs).sample)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    processor.statistics = none = script.NoStatistics()
    script.seconds_of_run(model, inputs, processor, 2)
    assert (none.sparse_calls, none.calls, none.steps, none.planning_seconds) == (0, [], [], 0.0)


@torch.inference_mode()
def test_the_hosts_time_is_that_of_the_statistics_code(script, tiny, monkeypatch):
    """By a clock that counting moves on by 1, and attending by 100."""
    model, processor, inputs = tiny
    now = [0.0]

    def moving_on(by, real):
        def call(*given, **named):
            now[0] += by
            return real(*given, **named)

        return call

    monkeypatch.setattr(script.PSAStatistics, "count_sparse", moving_on(1, script.PSAStatistics.count_sparse))
    monkeypatch.setattr(operations, "attend", moving_on(100, operations.attend))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    processor.statistics = clocked = script.ClockedStatistics()
    seconds = script.seconds_of_run(model, inputs, processor, 2, lambda: now[0])
    assert (clocked.sparse_calls, clocked.seconds, seconds) == (4, 4, 404)
    assert clocked.attention_seconds == 400


def test_the_processs_time_is_for_the_cpu(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--model", "tiny", "--device", "cuda", "--cpu-time"])
    assert "--cpu-time is for --device cpu" in capsys.readouterr().err


def test_overhead(script):
    off = [1.0, 2.0, 4.0, 2.0, 1.0]
    row = script.compare([1.1 * seconds for seconds in off], off)
    assert row["overhead"] == row["overhead_low"] == row["overhead_high"] == pytest.approx(0.1)
    assert row["with_ms"] == pytest.approx(2200) and row["without_ms"] == pytest.approx(2000)


def test_who_begins_changes(script):
    order = []

    def named(name, seconds):
        return lambda: order.append(name) or seconds

    assert script.take_turns(named("on", 2.0), named("off", 1.0), 3) == ([2.0] * 3, [1.0] * 3)
    assert order == ["off", "on", "on", "off", "off", "on"]

"""--prompts-file: numbered folders, resumed and interrupted runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from psa_diffusers.cli import generation
from psa_diffusers.metrics import read_video


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# what to draw\na red circle\n\n  a blue square  \na red ball moves left\n")
    return file


@pytest.fixture
def many(psa_generate, saved_model, prompts, tmp_path):
    def run(*arguments):
        return psa_generate(
            *("--prompts-file", prompts, "--model", saved_model, "--steps", 2, "--output", tmp_path / "out", *arguments)
        )

    return run


@pytest.fixture
def calls(monkeypatch):
    """The prompts that were really generated; set ``calls.fail_at`` to make one of them fail."""

    class Calls(list):
        fail_at, error = None, KeyboardInterrupt

    calls, real = Calls(), generation.generate

    def counting(pipe, prompt, *arguments, **options):
        calls.append(prompt)
        if len(calls) == calls.fail_at:
            raise calls.error
        return real(pipe, prompt, *arguments, **options)

    monkeypatch.setattr(generation, "generate", counting)
    return calls


def stamps(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.*"))}


def finished(folder):
    record = folder / "run.json"
    return record.exists() and json.loads(record.read_text())["finished"]


def test_one_numbered_folder_a_prompt(many, tmp_path, calls):
    run = many("--json")
    assert calls == ["a red circle", "a blue square", "a red ball moves left"]
    assert [record["prompt"] for record in run.json] == calls
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["001", "002", "003"]
    for record, folder in zip(run.json, sorted((tmp_path / "out").iterdir()), strict=True):
        assert record == json.loads((folder / "run.json").read_text())
        assert len(read_video(folder / "video.mp4")) == 5


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (RuntimeError("broken"), 1)])
def test_what_is_finished_stays_and_the_next_run_makes_the_rest(many, tmp_path, calls, error, code):
    calls.fail_at, calls.error = 2, error
    run = many()
    assert run.code == code and "Traceback" not in run.err
    assert [str(path) for path in stamps(tmp_path / "out")] == ["001/run.json", "001/video.mp4"]
    before = stamps(tmp_path / "out" / "001")
    calls.clear()
    calls.fail_at = None
    run = many()
    assert run.code == 0 and calls == ["a blue square", "a red ball moves left"]
    assert "1 of 3 videos are there already" in run.err
    assert stamps(tmp_path / "out" / "001") == before


def test_overwrite_makes_all_anew(many, calls):
    assert many().code == 0
    calls.clear()
    assert many().code == 0 and calls == []
    assert many("--overwrite").code == 0 and len(calls) == 3


def test_another_run_in_the_folder_is_refused_before_anything_is_made(many, tmp_path, calls):
    assert many().code == 0
    before = stamps(tmp_path / "out")
    calls.clear()
    run = many("--seed", 5)
    assert run.code == 2 and "001 already holds" in run.err and "--overwrite" in run.err
    assert calls == [] and stamps(tmp_path / "out") == before


def test_an_interrupted_comparison_keeps_the_sparse_video_and_is_made_again(many, tmp_path, calls):
    calls.fail_at = 2  # the first prompt's dense run
    assert many("--compare").code == 130
    assert [str(path) for path in stamps(tmp_path / "out")] == ["001/run.json", "001/video.mp4"]
    record = json.loads((tmp_path / "out" / "001" / "run.json").read_text())
    assert record["finished"] is False and record["sparse_steps"] == 1
    calls.clear()
    calls.fail_at = None
    assert many("--compare").code == 0
    assert len(calls) == 6
    assert all(json.loads((tmp_path / "out" / n / "run.json").read_text())["finished"] for n in ("001", "002", "003"))


def test_ctrl_c_in_a_real_process(saved_model, prompts, tmp_path):
    """SIGINT while the second video is being made: exit 130, the first stays, nothing half-written."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "psa_diffusers.cli.generate", "--prompts-file", prompts, "--model", saved_model]
    command += ["--steps", "300", "--output", out]
    (tmp_path / "dense.yaml").write_text("dense_warmup: 1.0\n")
    command += ["--config", tmp_path / "dense.yaml"]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background shell has it ignored
    command = [str(part) for part in command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ, preexec_fn=listen)
    try:
        deadline = time.monotonic() + 300
        while not finished(out / "001"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped; finished files were kept" in errors and "Traceback" not in errors
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["001/run.json", "001/video.mp4"]
    assert len(read_video(out / "001" / "video.mp4")) == 5

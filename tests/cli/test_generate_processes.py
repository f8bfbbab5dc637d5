"""Several processes, as ``accelerate launch`` starts them, share the prompts of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from psa_diffusers.cli import processes
from psa_diffusers.cli.errors import FAILED, WRONG_USAGE, WrongUsageError
from psa_diffusers.cli.generation import _of_this_process
from psa_diffusers.cli.output import plan_folders
from psa_diffusers.metrics import psnr, read_video

from .test_generate_many import finished, stamps

PROMPTS = ["a red circle", "a blue square", "a red ball moves left"]
ACCELERATE = Path(sys.executable).with_name("accelerate")


def start(*arguments: object, count: int = 2, command: str = "generate") -> subprocess.Popen:
    # --multi_gpu is how accelerate starts several processes on one machine; without a GPU they run on the CPU.
    launch = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", count, "--main_process_port", 0]
    launch += ["-m", f"psa_diffusers.cli.{command}", "--device", "cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([str(part) for part in launch], **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        stop(process)
    return process.returncode, out, err


def stop(process: subprocess.Popen) -> None:
    """End what may be left of a launcher and its processes."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()


@pytest.fixture
def request_of(saved_model, tmp_path):
    """The arguments for these prompts."""

    def make(prompts, *arguments):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(prompts))
        return ["--prompts-file", file, "--model", saved_model, "--output", tmp_path / "out", *arguments]

    return make


def test_prompts_are_shared_and_a_second_run_makes_nothing_anew(request_of, psa_generate, tmp_path):
    out, arguments = tmp_path / "out", request_of(PROMPTS, "--steps", 2)
    assert psa_generate(*request_of(PROMPTS[:1], "--steps", 2, "--device", "cpu")).code == 0
    before = stamps(out)
    code, printed, said = finish(start(*request_of(PROMPTS, "--steps", 2), "--json"))
    assert code == 0, said
    assert [record["prompt"] for record in json.loads(printed)] == PROMPTS[1:]
    assert said.count("1 of 3 videos are there already") == 1 and said.count("2 processes make 2 videos") == 1
    assert "002: " in said and "003: " not in said  # the other process is silent
    assert said.count("PSA:   0%") == 1
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert all(finished(out / number) for number in ("001", "002", "003"))
    before = stamps(out)
    assert psa_generate(*arguments, "--device", "cpu").code == 0
    assert stamps(out) == before
    # As by one process, but for rounding: native matrix products may differ in the last bit from process to process.
    assert psa_generate(*request_of(PROMPTS, "--steps", 2, "--device", "cpu"), "--output", tmp_path / "one").code == 0
    for number in ("002", "003"):
        one, two = (read_video(folder / number / "video.mp4") for folder in (tmp_path / "one", out))
        assert psnr(one, two) > 45


def test_a_failure_in_one_process_lets_the_other_finish(request_of, tmp_path):
    (tmp_path / "out" / "002" / "video.mp4").mkdir(parents=True)  # cannot be written
    code, printed, said = finish(start(*request_of(PROMPTS, "--steps", 2, "--overwrite")))
    assert code == 1 and printed == ""
    assert said.count("process 1 of 2 failed: ") == 1 and "cannot write" in said
    assert "the same command makes the rest" in said
    assert [finished(tmp_path / "out" / number) for number in ("001", "002", "003")] == [True, False, True]


def test_a_killed_process_ends_the_others_and_the_next_run_goes_on(request_of, psa_generate, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "dense.yaml").write_text("dense_warmup: 1.0\n")
    arguments = request_of(PROMPTS * 2, "--steps", 200, "--config", tmp_path / "dense.yaml")
    process = start(*arguments)
    try:
        deadline = time.monotonic() + 300
        while not (finished(out / "001") and finished(out / "002")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
        next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
        process.communicate(timeout=120)
    finally:
        stop(process)
    assert process.returncode == 1
    kept = stamps(out)
    assert {path.name for path in kept} == {"run.json", "video.mp4"}  # nothing half-written
    done = [path.parent for path in kept if path.name == "run.json" and finished(out / path.parent)]
    assert len(done) < 6
    assert psa_generate(*arguments, "--device", "cpu").code == 0
    assert all(finished(folder) for folder in out.iterdir()) and len(list(out.iterdir())) == 6
    for name, stamp in stamps(out).items():
        assert name.parent not in done or stamp == kept[name]


def test_wrong_usage_is_said_once(request_of):
    code, printed, said = finish(start(*request_of(["xyzzy"]), "--json"))
    assert code == 1  # the launcher's own
    assert said.count("knows no word") == 1 and "process 0" not in said
    assert json.loads(printed)["exit_code"] == 2


LEAVES = """
import sys
import torch.distributed as dist
from psa_diffusers.cli.errors import run_command
from psa_diffusers.cli.{command} import app

code = run_command("psa-{command}", app, sys.argv[1:])
print(code, dist.is_initialized())
"""


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_processes_take_leave_of_each_other(command, request_of, tmp_path):
    """Where they do not, some abort at their end, and the launcher stops the others."""
    script = tmp_path / "script.py"
    script.write_text(LEAVES.format(command=command))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script]
    words = [str(word) for word in (*launch, *request_of(["a red circle", "xyzzy"]), "--device", "cpu")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["2", "False"] * 2, done.stderr


def test_nobody_waits_for_processes_that_may_be_gone(monkeypatch):
    left = []
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: left.append(True))
    launched = processes.LaunchedProcesses.__new__(processes.LaunchedProcesses)
    for launched._is_waiting, count in ((True, 0), (False, 1)):
        with launched:
            pass
        assert len(left) == count


class Two(processes.Processes):
    index, count, device = 1, 2, "cuda:1"


def test_what_several_processes_refuse():
    with pytest.raises(WrongUsageError, match="--prompts-file"):
        _of_this_process(Two(), None, (None, None, "none"))
    with pytest.raises(WrongUsageError, match="--device cuda: leave it out"):
        _of_this_process(Two(), Path("prompts.txt"), ("cuda", None, "none"))
    assert _of_this_process(Two(), Path("prompts.txt"), (None, "float16", "none")) == ("cuda:1", "float16", "none")


def test_one_process_without_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = processes.find_processes("cpu")
    assert type(alone) is processes.Processes and alone.is_main
    assert alone.share([1, 2]) == [1, 2] and alone.together(lambda: 3) == [3]
    assert Two().share(range(5)) == [1, 3]


def test_processes_that_cannot_find_each_other_are_refused(monkeypatch):
    """Some launchers say how many processes there are, and not which one this is."""
    alone = SimpleNamespace(num_processes=1, process_index=0, device="cpu")
    monkeypatch.setattr("accelerate.PartialState", lambda **options: alone)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(WrongUsageError, match="speaks of 4 processes"):
        processes.find_processes(None)


@pytest.mark.parametrize(
    ("failures", "code", "message"),
    [
        ({0: (2, "no such model"), 1: (2, "no such model")}, WRONG_USAGE, "no such model"),
        ({0: (2, "already there")}, WRONG_USAGE, "already there"),
        ({1: (1, "disk full")}, FAILED, "process 1 of 2 failed: disk full\nFinished files"),
        ({0: (2, "wrong"), 1: (1, "disk full")}, FAILED, "process 0 of 2 failed: wrong\nprocess 1 of 2 failed: disk"),
    ],
)
def test_one_error_of_several(failures, code, message):
    error = processes.joint_error(failures, 2)
    assert error.exit_code == code and str(error).startswith(message)


def test_another_gpu_of_the_machine_made_it(tmp_path):
    folder = tmp_path / "out" / "001"
    folder.mkdir(parents=True)
    (folder / "video.mp4").touch()
    (folder / "run.json").write_text(json.dumps({"prompt": "a", "device": "cuda:3", "finished": True}))
    assert plan_folders(tmp_path / "out", [{"prompt": "a", "device": "cuda:0"}], True, False) == [None]
    with pytest.raises(WrongUsageError, match="already holds"):
        plan_folders(tmp_path / "out", [{"prompt": "a", "device": "cpu"}], True, False)

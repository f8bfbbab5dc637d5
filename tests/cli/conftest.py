from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from psa_diffusers.cli import comparing
from psa_diffusers.cli.compare import app as compare_app
from psa_diffusers.cli.errors import run_command
from psa_diffusers.cli.generate import app

from .tiny_wan import save_model


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A tiny random Wan model on disk; do not change it (see ``broken_model``)."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def broken_model(saved_model, tmp_path) -> Path:
    """A copy of the tiny model, to damage."""
    return Path(shutil.copytree(saved_model, tmp_path / "broken"))


class Outcome:
    """What a command left behind: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def psa_generate(capsys):
    """Run psa-generate in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run_command("psa-generate", app, [str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def psa_compare(capsys):
    """Run psa-compare in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run_command("psa-compare", compare_app, [str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def compared(saved_model, tmp_path_factory) -> Path:
    """The folder of a finished comparison: two prompts, two seeds, two settings."""
    folder = tmp_path_factory.mktemp("compared")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square moves left\n")
    arguments = ["--prompts-file", prompts, "--model", saved_model, "--seeds", "0,1", "--preset", "default,psa-3"]
    arguments += ["--output", folder / "out", "--vbench", folder / "vbench", "--quiet"]
    assert run_command("psa-compare", compare_app, [str(argument) for argument in arguments]) == 0
    return folder / "out"


@pytest.fixture
def calls(monkeypatch):
    """(prompt, seed, setting) of each video that is really generated; ``calls.fail_at`` makes one of them fail."""

    class Calls(list):
        fail_at, error = None, KeyboardInterrupt

    calls, real = Calls(), comparing.generate

    def counting(pipe, prompt, settings, **options):
        calls.append((prompt, settings.seed, options.get("label") or "dense"))
        if len(calls) == calls.fail_at:
            raise calls.error
        return real(pipe, prompt, settings, **options)

    monkeypatch.setattr(comparing, "generate", counting)
    return calls

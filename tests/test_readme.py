"""Every command and every piece of Python in the README works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

from psa_diffusers import PSAConfig, demo
from psa_diffusers.cli.errors import run_command
from psa_diffusers.integration.forecast import expected_budget

from .cli.tiny_wan import save_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]

# What makes a snippet for a large model on a GPU run in a second here.
SMALLER = {
    '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': "MODEL",
    '"Wan-AI/Wan2.2-T2V-A14B-Diffusers"': "MODEL",
    "torch.bfloat16": "torch.float32",
    '.to("cuda")': '.to("cpu")',
    "pipe.enable_model_cpu_offload()": "pass",
    "num_frames=81": "num_frames=5, height=64, width=64, num_inference_steps=4, guidance_scale=1.0",
}


def commands() -> list[list[str]]:
    """The shell commands of the README, split at && and into words."""
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line.strip()]
    return [shlex.split(part) for line in lines for part in line.split(" && ")]


def commands_of(name: str) -> list[list[str]]:
    return [command for command in commands() if command[0] == name]


def named(command: list[str]) -> str:
    return " ".join(command)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", vocabulary=False)


def bundled_or(tiny: Path) -> Path:
    try:
        return demo.model_folder()
    except FileNotFoundError:
        return tiny


def test_every_block_is_of_a_kind_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert {command[0] for command in commands()} <= {
        "pip",
        "python",
        "psa-generate",
        "psa-compare",
        "psa-bench",
        "psa-doctor",
        "accelerate",
        "jupyter",
        "ruff",
    }


def test_the_first_command_installs_and_generates_and_the_second_runs_the_tests():
    first, second = (text.split(" && ") for language, text in BLOCKS[:2])
    assert first[0] == "pip install ." and first[1].startswith("psa-generate --prompt ")
    assert "--model" not in first[1]
    assert second[0] == 'pip install -e ".[test]"' and second[1].strip() == "python -m pytest"


@pytest.mark.parametrize("command", commands_of("pip"), ids=named)
def test_what_is_installed_exists(command):
    """Not run here (CI installs by the same words): its parts are checked against the project."""
    assert command[:2] == ["pip", "install"]
    for word in command[2:]:
        extras = re.fullmatch(r"(?:\.|psa-diffusers)(?:\[(.*)\])?", word)
        if extras:
            assert set((extras[1] or "").split(",")) - {""} <= set(PROJECT["optional-dependencies"])
        else:
            known = ("-e", "-c", "torch", "--index-url", "https://download.pytorch.org/whl/cpu")
            assert word in known or (ROOT / word).is_file()


@pytest.mark.parametrize("command", commands_of("psa-generate"), ids=named)
def test_psa_generate(command, tiny, tmp_path, capsys, monkeypatch):
    """With fewer and smaller frames and steps than the README's."""
    from psa_diffusers.cli.generate import app

    monkeypatch.chdir(tmp_path)
    smaller = ["--model", bundled_or(tiny), "--steps", 2, "--num-frames", 5, "--height", 64, "--width", 64]
    smaller = [] if "--help" in command else [str(part) for part in smaller]
    assert run_command("psa-generate", app, [*command[1:], *smaller]) == 0, capsys.readouterr().err
    if smaller:
        folder = tmp_path / command[command.index("--output") + 1]
        expected = {"video.mp4", "run.json"} | ({"dense.mp4", "side_by_side.mp4"} if "--compare" in command else set())
        assert {file.name for file in folder.iterdir()} == expected


@pytest.mark.parametrize("command", commands_of("psa-compare"), ids=named)
def test_psa_compare(command, tiny, tmp_path, capsys, monkeypatch):
    """With a small model, one prompt, fewer and smaller frames and steps than the README's."""
    from psa_diffusers.cli.compare import app

    monkeypatch.chdir(tmp_path)
    smaller = ["--model", tiny, "--prompt", "a red circle", "--steps", 2, "--num-frames", 5, "--quiet"]
    assert run_command("psa-compare", app, [*command[1:], *map(str, smaller)]) == 0, capsys.readouterr().err
    folder = tmp_path / command[command.index("--output") + 1]
    named_files = set(re.findall(r"`((?:report|compare|totals|clips|frames)\.\w+)`", README))
    assert {file.name for file in folder.iterdir()} == named_files | {"videos"}


@pytest.mark.parametrize("command", commands_of("accelerate"), ids=named)
def test_many_prompts(command, tiny, tmp_path):
    """On the CPU, with fewer and smaller frames and steps than the README's."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    assert command[1] == "launch"
    port = ["--main_process_port", "0"]  # another test may be on the usual one
    smaller = ["--model", str(tiny), "--device", "cpu", "--steps", "2", "--quiet"]
    command = [Path(sys.executable).with_name("accelerate"), "launch", *port, *command[2:], *smaller]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    folder = tmp_path / command[command.index("--output") + 1]
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*.*")} == {
        f"{number}/{name}" for number in ("001", "002") for name in ("run.json", "video.mp4")
    }


@pytest.mark.parametrize("command", commands_of("psa-bench"), ids=named)
def test_psa_bench(command, capsys):
    """With fewer tokens and repeats than the README's."""
    from psa_diffusers.cli.bench import app

    assert run_command("psa-bench", app, [*command[1:], "--tokens", "512,1024", "--repeats", "1"]) == 0
    assert "1024" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands_of("psa-doctor"), ids=named)
def test_psa_doctor(command, capsys):
    from psa_diffusers.cli.doctor import app

    assert run_command("psa-doctor", app, command[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", commands_of("jupyter"), ids=named)
def test_jupyter(command):
    """Not started here (tests/notebooks runs the notebooks): it opens a notebook, and the extra brings it."""
    assert command[:2] == ["jupyter", "lab"] and all((ROOT / file).is_file() for file in command[2:])
    assert "jupyterlab" in PROJECT["optional-dependencies"]["notebooks"]


def test_all_notebooks_are_named():
    assert {file.name for file in (ROOT / "notebooks").glob("*.ipynb")} == set(
        re.findall(r"- `notebooks/(\S+)`:", README)
    )


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_python(code, tiny):
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    assert "cuda" not in code and "Wan-AI" not in code
    exec(compile(code, "README.md", "exec"), {"MODEL": str(tiny)})


def test_ci_runs_the_same_tests():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == named(commands_of("python")[0]) == "python -m pytest"


def test_the_presets_of_the_table_are_those_there_are():
    rows = re.findall(r"^\| `([\w-]+)` \|", README, flags=re.MULTILINE)
    assert set(rows) == set(PSAConfig.presets())
    for name, budget in re.findall(r"^\| `([\w-]+)` \|(?:[^|]*\|)?? (0\.\d+) \|", README, flags=re.MULTILINE):
        assert expected_budget(PSAConfig.preset(name)) == pytest.approx(float(budget)), name


def test_the_versions_of_the_table_are_those_of_the_package():
    table = dict(re.findall(r"^\| (\w+) \| ([^|]+?) \|", README, flags=re.MULTILINE))
    assert PROJECT["requires-python"] == f">={table['Python'].split()[0]}"
    for name in ("torch", "diffusers", "transformers"):
        assert f"{name}>={table[name]}" in PROJECT["dependencies"]
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    newest = dict(re.findall(r"^\| (\w+) \| [^|]+ \| ([\d.]+) \|", README, flags=re.MULTILINE))
    for name in ("torch", "diffusers", "transformers"):
        assert constraints[name].startswith(newest[name])
    assert "triton" not in constraints


def test_presets_and_model_go_into_the_wheel():
    wheel = SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"configs": "psa_diffusers/configs"} and wheel["packages"] == ["psa_diffusers"]

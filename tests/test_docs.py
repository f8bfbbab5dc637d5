"""Every command and piece of Python in docs, CONTRIBUTING and CHANGELOG works, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from psa_diffusers import PSAConfig
from psa_diffusers.cli import bench, compare, doctor, generate, tune
from psa_diffusers.cli.errors import run_command

from .cli.tiny_wan import save_model
from .test_readme import PROJECT, ROOT, SMALLER

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
APPS = {
    "psa-generate": generate.app,
    "psa-compare": compare.app,
    "psa-bench": bench.app,
    "psa-doctor": doctor.app,
    "psa-tune": tune.app,
}
COMMANDS = r"`((?:psa-\w+|python scripts/\S+) --[^`]+|python scripts/\S+)`"


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in found} <= {"bash", "python", "yaml"}, page
    return [text for kind, text in found if kind == language]


def shell() -> list[list[str]]:
    """The commands in blocks of all pages, in words."""
    lines = [line for page in PAGES for text in blocks(page, "bash") for line in text.splitlines() if line.strip()]
    return [shlex.split(part) for line in lines for part in line.split(" && ")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", vocabulary=False)


@pytest.mark.parametrize("code, page", [(code, page.name) for page in PAGES for code in blocks(page, "python")])
def test_python(code, page, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    assert "cuda" not in code and "Wan-AI" not in code
    exec(compile(code, page, "exec"), {"MODEL": str(tiny)})


@pytest.mark.parametrize("text, page", [(text, page.name) for page in PAGES for text in blocks(page, "yaml")])
def test_settings(text, page):
    assert PSAConfig.from_dict(yaml.safe_load(text)) != PSAConfig()


@pytest.mark.parametrize("command", [words for words in shell() if words[0] in APPS], ids=" ".join)
def test_commands(command, tiny, tmp_path, capsys, monkeypatch):
    """With a small model and fewer prompts, frames and steps than the page's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "tuned.yaml").write_text("compute_budget: 0.2\n") if command[0] != "psa-tune" else None
    (tmp_path / "mine.yaml").write_text("compute_budget: 0.2\n")
    smaller = {
        "psa-generate": ["--model", tiny, "--steps", 2],
        "psa-compare": ["--model", tiny, "--steps", 2, "--quiet"] + ["--limit", 1] * ("--prompt-set" in command),
        "psa-bench": ["--tokens", "512", "--repeats", 1],
        "psa-doctor": [],
        "psa-tune": ["--model", tiny, "--quiet"],
    }[command[0]]
    words = [*command[1:], *map(str, smaller)]
    assert run_command(command[0], APPS[command[0]], words) == 0, capsys.readouterr().err


def test_every_other_command_is_known():
    known = {"accelerate", "pip", "python", "ruff"}
    assert {words[0] for words in shell()} <= known | set(APPS)
    for words in shell():
        if words[0] == "pip":
            extras = [re.fullmatch(r"(?:\.|psa-diffusers)\[(.*)\]", word) for word in words]
            names = {name for match in extras if match for name in match[1].split(",")}
            assert names and names <= set(PROJECT["optional-dependencies"])
        if words[0] == "accelerate":
            module = words[words.index("-m") + 1]
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_words_and_tables_have_real_scripts_and_options(page):
    """They take too long to be run here: the script is there, and has these options."""
    written = [words for words in shell() if words[:2] != ["python", "-m"]] if page == PAGES[0] else []
    written += [shlex.split(text) for text in re.findall(COMMANDS, page.read_text(encoding="utf-8"))]
    for words in written:
        if words[0] == "python":
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            if "psa_diffusers.cli.compare" in source:  # hands its options on
                source += (ROOT / "psa_diffusers" / "cli" / "compare.py").read_text(encoding="utf-8")
        elif words[0] in APPS:
            name = words[0].removeprefix("psa-")
            source = (ROOT / "psa_diffusers" / "cli" / f"{name}.py").read_text(encoding="utf-8")
        else:
            continue
        for option in (word for word in words if word.startswith("--") and word != "--help"):
            bare = option.removeprefix("--")
            assert option in source or re.search(rf"\b{bare.replace('-', '_')}\b", source), (words, option)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).is_file(), target
    for name in re.findall(r"`((?:docs|scripts|notebooks|tests|configs|benchmarks|psa_diffusers)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:planning|backends|integration)/[\w./]*)`", text):
        assert (ROOT / "psa_diffusers" / name).exists(), name


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_reasons_in_troubleshooting_are_those_of_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`[^|]+?) \|", text, flags=re.MULTILINE)
    reasons = {reason for cell in table for reason in re.findall(r"`([^`]+)`", cell)}
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "psa_diffusers/integration").rglob("*.py"))
    assert len(reasons) > 8 and all(f'"{reason}"' in sources for reason in reasons), reasons

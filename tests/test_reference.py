"""docs/api (CI builds it, warnings being errors) holds every public name, and docstrings tell the truth."""

from __future__ import annotations

import inspect
import re
from importlib import import_module

import pytest

import psa_diffusers
from psa_diffusers import integration, metrics, planning

from .test_readme import PROJECT, ROOT

PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.rst")}
PUBLIC = [
    *(f"psa_diffusers.{name}" for name in psa_diffusers.__all__),
    *(f"psa_diffusers.integration.{name}" for name in integration.__all__),
]


def listed() -> list[str]:
    """Full names of everything that the pages document."""
    text = "\n".join(PAGES.values())
    names = re.findall(r"^\.\. auto(?:function|class):: (\S+)", text, flags=re.MULTILINE)
    for module, members in re.findall(r"^\.\. automodule:: (\S+)\n   :members: (.+)", text, flags=re.MULTILINE):
        names += [f"{module}.{name}" for name in members.split(", ")]
    return names + [f"psa_diffusers.metrics.{name}" for name in metrics.__all__]  # :imported-members:


def find(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def described(thing) -> list[str]:
    """The arguments that a docstring's section "Args" names."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(thing) or "", flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"^    (\w[\w, ]*):", section[1], flags=re.MULTILINE) if section else []
    return [name for group in names for name in group.split(", ")]


def test_every_public_name_is_in_the_reference():
    found = {id(find(name)) for name in listed()}
    assert [name for name in PUBLIC if id(find(name)) not in found] == []
    assert set(planning.__all__) <= {name.rpartition(".")[2] for name in listed()}
    assert set(re.findall(r"^   (\w+)$", PAGES["index"], flags=re.MULTILINE)) == set(PAGES) - {"index"}


@pytest.mark.parametrize("name", listed())
def test_docstrings_describe_the_arguments_that_there_are(name):
    thing = find(name)
    assert inspect.getdoc(thing), name
    names = described(thing)
    assert set(names) <= set(inspect.signature(thing).parameters), name
    assert len(names) == len(set(names))


def test_the_extra_and_the_versions_are_there():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert set(PROJECT["optional-dependencies"]["docs"]) <= pinned
    script = (ROOT / ".ci" / "run").read_text()
    assert ",docs]" in script and "python -m sphinx -W -n" in script

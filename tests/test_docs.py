"""The documentation and the program agree: commands, options, the reference of study files, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from command import workbench

from workbench.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SCRIPT_WORDS = set(re.findall(r"^(\w+)\)", (ROOT / "workbench.sh").read_text(), re.MULTILINE))
CALL = re.compile(r"(?:(?<![\w./])workbench|workbench\.sh) ([a-z][\w-]*)([^\n|`#]*)")


def code(page: Path) -> str:
    """What a page shows to be typed, and what is printed, with continued lines joined."""
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    typed = "\n".join(text for language, text in blocks if language in ("", "sh", "bash", "console"))
    return typed.replace("\\\n", " ")


def options(words: str) -> Iterator[str]:
    """The options in what is typed after a command."""
    try:
        parts = shlex.split(words)
    except ValueError:  # an apostrophe of what stands beside
        parts = words.split()
    return (part.partition("=")[0] for part in parts if re.match(r"--?[a-z]", part))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    assert re.search(rf"\bworkbench(\.sh)? {command}\b", TEXT), f"`workbench {command}` is in no page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_command_exists(page: Path) -> None:
    assert "quickstart" in SCRIPT_WORDS
    assert set(re.findall(r"(?<![\w./])workbench ([a-z][\w-]*)", code(page))) <= set(COMMANDS)
    assert set(re.findall(r"workbench\.sh ([a-z][\w-]*)", code(page))) <= set(COMMANDS) | SCRIPT_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_option_exists(page: Path) -> None:
    wrong = []
    quoted = "\n".join(re.findall(r"`([^`]*)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)))
    for command, words in CALL.findall(f"{code(page)}\n{quoted}"):
        known = {name for param in getattr(COMMANDS.get(command), "params", ()) for name in param.opts}
        wrong += [f"{command} {option}" for option in options(words) if command in COMMANDS and option not in known]
    assert wrong == []


@pytest.mark.parametrize("command", ["register", "predict", "export"])
def test_the_registry_page_names_every_option(command: str) -> None:
    page = (ROOT / "docs" / "registry.md").read_text()
    named = {max(param.opts, key=len) for param in COMMANDS[command].params if param.opts[0].startswith("-")}
    assert [option for option in named if option not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_reference_is_up_to_date() -> None:
    known = (ROOT / "docs" / "reference.md").read_text()
    printed = workbench("schema", "--format", "markdown").out
    assert known == printed, "run: workbench schema --format markdown > docs/reference.md"


@pytest.mark.parametrize("name", ["README.md", "docs/study.md"])
def test_the_study_that_a_page_begins_with_is_right(name: str, tmp_path: Path) -> None:
    from workbench.sweep.spec import load_study

    text = next(text for text in re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))
    (tmp_path / "assets").symlink_to(ROOT / "studies" / "assets")
    (tmp_path / "study.yaml").write_text(text)
    assert "lora" in load_study(tmp_path / "study.yaml").methods

"""The documentation and the commands agree: every command is documented, every documented command exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from workbench.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
SCRIPT_WORDS = set(re.findall(r"^(\w+)\)", (ROOT / "workbench.sh").read_text(), re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    assert re.search(rf"\bworkbench(\.sh)? {command}\b", TEXT), f"`workbench {command}` is in no page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_command_exists(page: Path) -> None:
    assert "quickstart" in SCRIPT_WORDS
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    code = "\n".join(text for language, text in blocks if language in ("", "sh", "bash", "console"))
    assert set(re.findall(r"(?<![\w./])workbench ([a-z][\w-]*)", code)) <= set(COMMANDS)
    assert set(re.findall(r"workbench\.sh ([a-z][\w-]*)", code)) <= set(COMMANDS) | SCRIPT_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []

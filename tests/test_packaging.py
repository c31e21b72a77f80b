"""What is shipped: the declared dependencies, the lock and the bootstrap script."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by the name of the distribution."""
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


RUNTIME = requirements(PROJECT["dependencies"])
EXTRAS = {extra: requirements(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
TEST, SERVER = EXTRAS["test"], EXTRAS["server"]
ON_DEMAND = EXTRAS["postgres"] | EXTRAS["quantised"] | EXTRAS["ray"] | EXTRAS["slurm"]  # imported where it is asked for
PART_OF = {"pydantic-core": "pydantic", "mlflow-skinny": "mlflow", "mlflow-tracing": "mlflow", "pluggy": "pytest"}
LOCK = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def imported(*folders: str) -> set[str]:
    """The distributions whose modules the Python files below these folders import."""
    names: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    owners = packages_distributions()
    found = {canonicalize_name(owner) for name in names for owner in owners.get(name, [])} - {"workbench"}
    return {PART_OF.get(name, name) for name in found}


def test_every_import_is_declared_and_every_dependency_is_used() -> None:
    always = imported("workbench", "dashboards") - set(ON_DEMAND)
    assert always == set(RUNTIME) - {"cmaes"}, "which Optuna imports for its sampler"


def test_what_tests_import_is_declared() -> None:
    assert imported("tests", "benchmarks") <= set(RUNTIME) | set(TEST)


def test_what_the_image_runs_is_declared() -> None:
    assert imported("docker") <= set(RUNTIME) | set(SERVER)


@pytest.mark.parametrize("extra", ["docs", "postgres", "ray", "slurm"])
def test_an_extra_is_tested(extra: str) -> None:
    assert EXTRAS[extra].items() <= TEST.items()


def test_the_lock_holds_one_allowed_version_of_each_dependency() -> None:
    for name, wanted in (RUNTIME | SERVER | TEST).items():
        pins = [r for r in LOCK if canonicalize_name(r.name) == name and (not r.marker or r.marker.evaluate())]
        assert len(pins) == 1, name
        version = str(pins[0].specifier).removeprefix("==")
        assert wanted.specifier.contains(version), f"{name} {version} is outside {wanted}"
        assert "+" not in version, f"{name} {version}: a build for one kind of machine"


def test_the_lock_names_no_place() -> None:
    assert not re.search(r"://|^-|file:|@", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


# the bootstrap script, with a false environment that only reports how it was called


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder, with a space in its name, that holds what workbench.sh needs, and no environment yet."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("workbench.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(clone: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Call workbench.sh from another folder, as users do."""
    command = [str(clone / "workbench.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=clone.parent, env=os.environ | env)


@pytest.fixture
def installed(clone: Path) -> Path:
    """A clone whose environment is up to date; its programs print how they were called and exit with 7."""
    log = clone / "installs"
    script(clone / ".venv/bin/python", f'[ "$2" = pytest ] && echo "pytest $5" && exit 7; echo "pip $*" >>"{log}"')
    script(clone / ".venv/bin/uv", f'echo "uv $*" >>"{log}"')
    script(clone / ".venv/bin/workbench", 'for word; do echo "<$word>"; done; exit 7')
    assert run(clone, "setup").returncode == 0
    log.unlink()
    return clone


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["show", "my study", "--home", "x y"], "<show>\n<my study>\n<--home>\n<x y>\n"),
        (["test", "tests/a b.py"], "pytest tests/a b.py\n"),
        (["quickstart", "--trials", "2"], "<sweep>\n<{clone}/studies/quickstart.yaml>\n<--trials>\n<2>\n"),
    ],
)
def test_the_script_passes_words_and_exit_codes_through(installed: Path, words: list[str], output: str) -> None:
    result = run(installed, *words)
    assert result.stdout == output.format(clone=installed)
    assert (result.returncode, result.stderr) == (7, "")
    assert not (installed / "installs").exists()


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_the_script_installs_again_only_after_a_change(installed: Path, file: str) -> None:
    with (installed / file).open("a") as stream:
        stream.write("# changed\n")
    assert run(installed, "schema").returncode == 7
    calls = (installed / "installs").read_text()
    assert "uv pip install -p .venv/bin/python -c constraints.txt -e .\n" in calls
    (installed / "installs").unlink()
    assert run(installed, "schema").returncode == 7
    assert not (installed / "installs").exists()
    assert run(installed, "test").returncode == 7  # the change has not reached the tools for tests yet
    assert "-e .[test]\n" in (installed / "installs").read_text()


def test_the_script_falls_back_to_pip_and_reports_a_failed_installation(installed: Path) -> None:
    (installed / "constraints.txt").write_text("")
    script(installed / ".venv/bin/uv", "exit 2")
    assert run(installed, "schema").returncode == 7
    assert "pip -m pip install -c constraints.txt -e .\n" in (installed / "installs").read_text()

    (installed / "constraints.txt").write_text("# again")
    script(installed / ".venv/bin/python", '[ "$4" = --no-deps ] || [ "$3" = --version ]')
    for _ in range(2):  # a failure is not taken for an installation the next time
        result = run(installed, "schema")
        assert (result.returncode, result.stdout) == (1, "")


def test_the_script_names_a_python_that_is_too_old(clone: Path) -> None:
    script(clone / "old", '[ "$1" = --version ] && echo "Python 3.9.1"')
    result = run(clone, "quickstart", PYTHON=str(clone / "old"))
    assert result.returncode == 1
    assert "Python 3.11 or newer" in result.stderr
    assert "Python 3.9.1" in result.stderr
    assert run(clone, "quickstart", PYTHON="/none").returncode == 1
    assert not (clone / ".venv").exists()


def test_the_script_without_words_explains_itself_and_installs_nothing(clone: Path) -> None:
    result = run(clone)
    assert result.returncode == 0
    assert "quickstart" in result.stdout
    assert not (clone / ".venv").exists()

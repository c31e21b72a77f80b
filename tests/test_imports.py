"""Who may import whom (docs/architecture.md), read from the source, and what an import really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("workbench/**/*.py"), *ROOT.glob("dashboards/**/*.py")])

# part of the project -> other parts that it may import; `errors` is open to all
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "adapters": set(),
    "training": {"adapters"},
    "serving": {"adapters", "training"},
    "tracking": set(),
    "sweep": {"adapters", "training", "serving", "tracking"},
    "dashboards": {"tracking"},
    "cli": {"adapters", "training", "serving", "tracking", "sweep", "dashboards"},
    "__main__": {"cli"},
}
ADAPTERS_MAY_IMPORT = {"torch", "transformers", "safetensors", "huggingface_hub", "tqdm"} | sys.stdlib_module_names
HEAVY = {"torch", "transformers", "datasets", "mlflow", "optuna", "streamlit", "pandas", "sklearn"}


def part_of(module: str) -> str | None:
    """The part of the project that holds a dotted module name, None for other people's modules."""
    top, _, rest = module.partition(".")
    if top == "workbench":
        return rest.split(".")[0] or "__init__"
    return "dashboards" if top == "dashboards" else None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of a file, also those within functions and `import_module("...")`."""
    package = module_name(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def faults(path: Path) -> Iterator[str]:
    """Each import of a file that the rules forbid."""
    part = part_of(module_name(path)) if path.name != "__main__.py" else "__main__"
    assert part in MAY_IMPORT, f"{path}: give the new part {part!r} its place in MAY_IMPORT"
    for line, name in imports(path):
        top = name.split(".")[0]
        target = part_of(name)
        own = target in (part, "errors", "__version__", "__init__")
        if target and not own and target not in MAY_IMPORT[part]:
            yield f"{path.relative_to(ROOT)}:{line}: {part} must not import {name}"
        if part == "adapters" and not target and top not in ADAPTERS_MAY_IMPORT:
            yield f"{path.relative_to(ROOT)}:{line}: adapters must not import {name}"
        if part == "dashboards" and top in {"torch", "transformers"}:
            yield f"{path.relative_to(ROOT)}:{line}: dashboards must not import {name}"
        if top == "peft":
            yield f"{path.relative_to(ROOT)}:{line}: peft is the peer of tests and benchmarks, never a dependency"


def test_directions() -> None:
    assert len(SOURCES) > 10
    assert [fault for path in SOURCES for fault in faults(path)] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("workbench/adapters/x.py", "from workbench.training import loop"),
        ("workbench/adapters/x.py", "from ..training.loop import train"),
        ("workbench/adapters/x.py", "from .. import sweep"),
        ("workbench/adapters/methods/x.py", "def f():\n    import numpy as np"),
        ("workbench/training/x.py", "import workbench.sweep.spec"),
        ("workbench/tracking/x.py", "from workbench.training.config import DataSection"),
        ("workbench/sweep/x.py", "from importlib import import_module\nimport_module('workbench.cli')"),
        ("workbench/sweep/x.py", "import dashboards"),
        ("workbench/training/x.py", "if True:\n    from peft import LoraConfig"),
        ("dashboards/x.py", "import torch.nn"),
        ("dashboards/x.py", "from workbench.sweep.run import sweep"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, source: str) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"import json\nfrom workbench.errors import WorkbenchError\n{source}\n")
    assert len(list(faults(path))) == 1


def loaded_by(*command: str) -> set[str]:
    """The top-level modules that a Python command line imports before it ends."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=False, cwd=ROOT
    )
    report = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if line not in report)
    return {line.rpartition("|")[2].strip().split(".")[0] for line in report}


def test_adapters_load_alone() -> None:
    loaded = loaded_by("-c", "import workbench.adapters")
    assert {"torch", "transformers"} <= loaded
    assert loaded & {"mlflow", "optuna", "streamlit", "pandas", "datasets", "pydantic", "peft"} == set()


def test_dashboards_load_without_torch() -> None:
    code = "import dashboards.compare, mlflow, optuna, streamlit, workbench.tracking.frames, workbench.tracking.runs"
    loaded = loaded_by("-c", code)
    assert {"mlflow", "optuna", "streamlit"} <= loaded
    assert loaded & {"torch", "transformers"} == set()


@pytest.mark.parametrize("module", ["workbench.training.config", "workbench.tracking.runs"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    loaded = loaded_by("-c", f"import {module}")
    assert "workbench" in loaded
    assert loaded & HEAVY == set()


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by("-m", "workbench", "--help")
    assert "workbench" in loaded
    assert loaded & HEAVY == set()

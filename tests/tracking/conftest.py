"""A store of one's own for every test, copied from one that MLflow has migrated once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from workbench.tracking.runs import Tracking, default_store, open_tracking


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template")
    open_tracking(*default_store(home))
    return home / "mlflow.db"


@pytest.fixture
def tracking(template: Path, tmp_path: Path) -> Tracking:
    shutil.copy(template, tmp_path / "mlflow.db")
    return open_tracking(*default_store(tmp_path))

"""Stores that are filled as a sweep fills them, the app on a store, and a browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import optuna
import pytest
import rich_study
from filled import TAGS, TRIALS, write_trial
from streamlit.testing.v1 import AppTest

from workbench.tracking.runs import default_store, open_tracking


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of a store without studies."""
    uri, root = default_store(tmp_path_factory.mktemp("empty"))
    open_tracking(uri, root)
    return uri


@pytest.fixture
def tracking(empty_store: str, tmp_path: Path):
    """A store of the test's own."""
    shutil.copy(empty_store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")  # quicker than a second migration
    return open_tracking(*default_store(tmp_path))


@pytest.fixture(scope="session")
def store(empty_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of the filled store; the study "done" has four trials, "young", the newer one, has none."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    home = tmp_path_factory.mktemp("home")
    storage = f"sqlite:///{home / 'optuna.db'}"
    search = optuna.create_study(study_name="done", storage=storage)
    shutil.copy(empty_store.removeprefix("sqlite:///"), home / "mlflow.db")
    uri, root = default_store(home)
    tracking = open_tracking(uri, root)
    study = tracking.open_study("done", {}, TAGS | {"workbench.optuna": storage}, {})
    for number, trial in enumerate(TRIALS):
        write_trial(study, number, *trial)
    search.enqueue_trial({})
    study.end("FINISHED")
    tracking.open_study("young", {}, TAGS | {"workbench.metric": "f1"}, {}).end("FINISHED")
    return uri


@pytest.fixture(scope="session")
def rich_store(empty_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of a store with a study in which everything can be seen that a page shows."""
    home = tmp_path_factory.mktemp("rich")
    shutil.copy(empty_store.removeprefix("sqlite:///"), home / "mlflow.db")
    return rich_study.make(home)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch):
    """Run a page of the app on a store, with the address `?key=value`."""

    def run(uri: str, page: str = "studies", **state: str | list[str]) -> AppTest:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        script = f"from dashboards import address, {page}\naddress.enter({page!r})\n{page}.page()\n"
        test = AppTest.from_string(script, default_timeout=120)
        for key, value in state.items():
            test.query_params[key] = value
        test.run()
        assert not test.exception
        return test

    return run


@pytest.fixture(scope="module")
def browser():
    """Chromium, Debian's or Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as started:
        path = shutil.which("chromium") or started.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])  # containers run as root
        yield opened
        opened.close()

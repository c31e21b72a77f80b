"""The dashboards: a Streamlit app that reads MLflow and Optuna through `workbench.tracking` and never imports torch."""

from __future__ import annotations

import sys
from pathlib import Path

from workbench.tracking.colours import COLOURS


def launch(tracking_uri: str, optuna_url: str | None, port: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves the dashboards on 127.0.0.1, and the environment variables to add for it.

    The stores travel as environment variables because a URL may hold a password, and every user can read command lines.

    Args:
        tracking_uri: the MLflow store.
        optuna_url: Optuna's storage; None takes the one that each study has recorded.
        port: TCP port on 127.0.0.1.
    """
    command = [sys.executable, "-m", "streamlit", "run", str(Path(__file__).parent / "app.py")]
    options = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "server.headless": "true",  # neither opens a browser nor asks for an email address
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "theme.light.primaryColor": COLOURS[0],  # what is ticked is not red, as errors are
        "theme.dark.primaryColor": COLOURS[5],
    }
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = {"MLFLOW_TRACKING_URI": tracking_uri}
    if tracking_uri.startswith("sqlite"):
        # a pooled connection would go on showing a file that the user has deleted and made anew
        environment["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"
    if optuna_url:
        environment["WORKBENCH_OPTUNA_URL"] = optuna_url
    return command, environment

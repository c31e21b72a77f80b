"""A trained adapter in use: opened on its base model, which adapters share, and asked for predictions."""

from __future__ import annotations

from pathlib import Path


def pyfunc_file() -> Path:
    """The file that MLflow is to run in order to serve an adapter."""
    return Path(__file__).parent / "pyfunc.py"

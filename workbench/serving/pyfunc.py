"""An adapter as MLflow serves it. MLflow keeps this file's text with a version and runs it there (models-from-code)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from workbench.serving.predictor import Predictor

BASE = "WORKBENCH_BASE"  # environment variable: the base model, where it is not as recorded
DEVICE = "WORKBENCH_DEVICE"  # environment variable: a torch device


class Adapter(PythonModel):
    """See `Predictor`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Put the adapter on its base, which other adapters in this process share."""
        folder = Path(context.artifacts["version"])
        self.predictor = Predictor.open(folder, os.environ.get(BASE), os.environ.get(DEVICE, "auto"))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Predict rows; parameters as of `Predictor.predict`, where 0 new tokens mean the default."""
        wanted = dict(params or {})
        limit = wanted.pop("max_new_tokens", 0) or None
        rows = {name: model_input[name].tolist() for name in model_input}
        return pd.DataFrame(self.predictor.predict(rows, limit, **wanted), index=model_input.index)


mlflow.models.set_model(Adapter())

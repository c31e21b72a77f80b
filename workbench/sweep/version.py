"""The folder of an adapter-only version: MLflow's pyfunc format, its code as text, its tensors as safetensors."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

import workbench
from workbench.serving import pyfunc_file
from workbench.serving.recipe import ADAPTER, TOKENIZER, Recipe
from workbench.tracking.registry import VERSION
from workbench.training.base import quiet

README = "README.md"
# what it takes to load and serve; workbench itself comes along as code
PACKAGES = ["datasets", "huggingface-hub", "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "sacrebleu"]
PACKAGES += ["safetensors", "scikit-learn", "tokenizers", "torch", "tqdm", "transformers"]
CODE = ("__init__.py", "errors.py", "adapters", "training", "serving")


def write(
    folder: Path, recipe: Recipe, adapter: Path, tokenizer: PreTrainedTokenizerBase, card: str, example: pd.DataFrame
) -> Path:
    """Write a version below a folder.

    Args:
        adapter: folder of the trial's adapter.
        card: what its README says.
        example: some rows of input.

    Returns:
        what MLflow can load.
    """
    contents, made = folder / Path(VERSION).name, folder / "model"
    shutil.copytree(adapter, contents / ADAPTER)
    with quiet():
        tokenizer.save_pretrained(contents / TOKENIZER)
    recipe.save(contents)
    save(made, contents, code(folder / "code"), example, recipe)
    (made / README).write_text(card, encoding="utf-8")
    return made


def save(made: Path, contents: Path, code: Path, example: pd.DataFrame, recipe: Recipe) -> None:
    """Let MLflow write its part."""
    from mlflow.pyfunc import save_model

    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on type hints of `predict`, which serving does not need
            save_model(
                str(made),
                python_model=str(pyfunc_file()),
                artifacts={contents.name: str(contents)},
                code_paths=[str(code)],
                signature=signature(recipe),
                input_example=example,
                pip_requirements=requirements(),
            )
    finally:
        logger.setLevel(level)


def signature(recipe: Recipe) -> Any:
    """The columns that go in and come out, and the parameters of a call."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    task = recipe.base.model.task
    words = Array("string")
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(words if field == "tokens" else "string", name) for field, name in recipe.columns.items()
    ]
    outputs: list[ColSpec | TensorSpec] = [ColSpec(words if task == "TOKEN_CLS" else "string", "prediction")]
    numbers = {"SEQ_CLS": ["score"], "CAUSAL_LM": ["loss"] if recipe.data.target is None else []}
    outputs += [ColSpec("double", name, required=False) for name in numbers.get(task, [])]
    limit, shares = ParamSpec("max_new_tokens", "long", 0), ParamSpec("probabilities", "boolean", False)
    params = {"SEQ_CLS": [shares], "CAUSAL_LM": [limit], "SEQ_2_SEQ_LM": [limit]}.get(task)
    called: Any = ParamSchema(params) if params else None
    return ModelSignature(Schema(inputs), Schema(outputs), called)


def requirements(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Each package with the version that is installed here, whichever build of it."""
    return [f"{name}=={installed(name).partition('+')[0]}" for name in packages]


def code(folder: Path) -> Path:
    """A copy of the parts of workbench that serve."""
    source, copy = Path(workbench.__file__).parent, folder / "workbench"
    copy.mkdir(parents=True)
    for name in CODE:
        if (source / name).is_dir():
            shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, copy / name)
    return copy

"""Our side: the study as a file, run the way `workbench sweep` does.

python -m speed.ours WORK.json RESULT.json
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 the seconds are without imports, on both sides
from rich.console import Console
from ruamel.yaml import YAML

from workbench.cli import stores
from workbench.sweep.display import Display
from workbench.sweep.run import sweep
from workbench.sweep.spec import load_study
from workbench.tracking import frames

from .work import Work

HEAD_ONLY = {"method": "lora", "target_modules": "dummy-target-modules"}  # the peer freezes the base itself


def main(work: Work) -> dict[str, Any]:
    """Run the study; seconds from the files to the last trial, and what each trial came to."""
    with tempfile.TemporaryDirectory() as folder:
        file, where = Path(folder, "study.yaml"), stores(Path(folder, "runs"), None, None)
        started = time.perf_counter()
        with file.open("w") as stream:
            YAML().dump(study_file(work), stream)
        study = load_study(file)
        sweep(study, where, Display(study, Console(file=io.StringIO())))
        seconds = time.perf_counter() - started
        table = frames.trials(where.tracking, study.name)
        trials = {row["label"]: trial(where.tracking, row) for _, row in table.iterrows()}
    return {"seconds": seconds, "trials": trials}


def study_file(work: Work) -> dict[str, Any]:
    """The work as a study file."""
    methods = {
        label: fields | (HEAD_ONLY if fields["method"] == "head" else {}) for label, fields in work.trials.items()
    }
    return {
        "study": "makespan",
        "model": {"path": work.model, "task": "SEQ_CLS"},
        "data": {
            "path": work.data,
            "text": "text",
            "label": "label",
            "max_length": work.max_length,
            "max_rows": {"train": work.train_rows, "validation": work.eval_rows},
        },
        "training": {
            "steps": work.steps,
            "batch_size": work.batch_size,
            "eval_batch_size": work.eval_batch_size,
            "eval_every": work.eval_every,
            "warmup": work.warmup,
            "seed": work.seed,
            **({"precision": work.precision} if work.precision != "fp32" else {}),
        },
        "methods": methods,
        "objective": {"metric": "loss"},
        "budget": {"trials": len(methods)},
        "search": {"sampler": "grid", "pruner": work.pruner, "seed": work.seed},
    }


def trial(tracking: str, row: Any) -> dict[str, Any]:
    """What the stores hold of one trial."""
    history = frames.history(tracking, row["run_id"])
    return {
        "outcome": row["outcome"],
        "losses": history.loc[history["metric"] == "validation.loss", "value"].tolist(),
        "seconds": row["seconds/total"],
        "work": row["seconds/train"] + row["seconds/eval"],
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(Work.read(sys.argv[1]))))

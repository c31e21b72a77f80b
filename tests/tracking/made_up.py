"""A study as a sweep would leave it in MLflow, with numbers that are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EXAMPLES = 200
SEEDS = [(i, j) for i in (11, 12, 13) for j in (21, 22)]
TAGS = {
    "workbench.metric": "accuracy",
    "workbench.goal": "maximize",
    "workbench.file": "s.yaml",
    "workbench.also": "",
    "workbench.per_method": "",
    "workbench.finalists": "",
    "workbench.test_rows": "200",
    "workbench.env.python": "3.11.7",
}
STUDY = "study: s  # <script>alert(1)</script>\nmodel: {path: m}\n"


def right(share, seed, examples=EXAMPLES):
    """Answers, of which exactly this share is right: which ones depends on the seed, one in ten of them."""
    rng = np.random.default_rng(seed)
    answers = np.arange(examples) < round(share * examples)
    swapped = rng.choice(np.flatnonzero(answers), examples // 20), rng.choice(np.flatnonzero(~answers), examples // 20)
    for one, other in zip(*swapped, strict=True):
        answers[one], answers[other] = answers[other], answers[one]
    return answers.astype(float)


def open_study(tracking, name="s", **tags):
    return tracking.open_study(
        name, {}, TAGS | {f"workbench.{key}": value for key, value in tags.items()}, {"study.yaml": STUDY}
    )


def trial(
    study,
    number,
    label="lora",
    value=None,
    outcome="complete",
    message="",
    role="search",
    params=100,
    rate=1e-3,
    seconds=2.5,
    **tags,
):
    """A trial: `value` is its accuracy after 30 steps, and half of it after 15."""
    known = {"label": label, "method": "lora", "role": role, "searched": "learning_rate r", "config": f"{number:016x}"}
    run = study.open_trial(
        number,
        {f"{label}.learning_rate": rate, f"{label}.r": 8},
        {f"workbench.{key}": str(text) for key, text in (known | tags).items()},
    )
    run.summary(
        {
            "trainable_params": params,
            "all_params": 10_000,
            "seconds/total": seconds,
            "tensor_peak_mib/train": 40 + number,
        }
    )
    if value is not None:
        run.log(15, {"validation.accuracy": value / 2})
        run.log(30, {"validation.accuracy": value})
    if outcome == "complete":
        run.summary({"adapter_bytes": 2048})
    if outcome != "running":
        run.end(outcome, message)
    else:
        run.flush()
    return run


def finalist(study, folder: Path, number, of, seeds, scores, label="lora", params=100, test=None, actual=None):
    """A finalist with its predictions on validation, and on the test split if it was promoted."""
    run = trial(
        study, number, label, float(np.mean(scores)), role="finalist", params=params,
        finalist_of=of, init_seed=seeds[0], order_seed=seeds[1],
    )  # fmt: skip
    for split, values in (("validation", scores), ("test", test)):
        if values is not None:
            write_predictions(folder / str(number) / f"{split}.parquet", values, actual)
            run.summary({f"{split}.accuracy": float(np.mean(values))} if split == "test" else {})
    run.artifacts(folder / str(number), "predictions")
    return run


def write_predictions(file: Path, scores, actual=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    count = len(scores)
    columns = {
        "row": range(count),
        "actual": actual or ["pos"] * count,
        "predicted": ["pos" if score else "neg" for score in scores],
        "loss": [0.5] * count,
        "score.accuracy": np.asarray(scores, dtype=float),
    }
    pq.write_table(pa.table(columns), file)


def finished_study(tracking, folder: Path, test=False, **tags):
    """Methods that are right on 84 % (`good`), 83 % (`alike`) and 60 % (`bad`); `lost` has no finalists."""
    made = json.dumps({"per_method": 1, "initialisations": 3, "orders": 2})
    study = open_study(tracking, finalists=made, **tags)
    number = 0
    for label, share, params in (("good", 0.84, 400), ("alike", 0.83, 100), ("bad", 0.6, 900)):
        trial(study, number, label, share - 0.1, role="default", params=params)
        for k, gap in enumerate((0.0, -0.05, -0.2)):
            trial(study, number + 1 + k, label, share + gap, params=params, rate=10.0 ** -(k + 2))
        number += 4
    trial(study, 12, "lost", 0.7)
    trial(study, 13, "lost", outcome="diverged", message="the loss is nan\nat step 3")
    trial(study, 14, "lost", outcome="diverged", message="the loss is nan\nat step 9")
    trial(study, 15, "lost", 0.2, outcome="pruned")
    trial(study, 16, "lost", outcome="out_of_memory", message="too large | by far")
    number = 17
    for label, share, of, params in (("good", 0.84, 1, 400), ("alike", 0.83, 5, 100), ("bad", 0.6, 9, 900)):
        for seeds in SEEDS:
            scores = right(share, number)
            finalist(
                study,
                folder,
                number,
                of,
                seeds,
                scores,
                label,
                params,
                right(share - 0.02, 100 + number) if test else None,
            )
            number += 1
    study.end("FINISHED")
    return study

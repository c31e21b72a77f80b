"""What a trial took in time and memory, phase by phase, as predicted and as measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

PHASES = ("load", "train", "eval")
# the first that is there is shown: exact peaks of tensors before what the process as a whole took
MEASURED = {
    "cuda_peak_allocated_mib": "GPU, tensors",
    "tensor_peak_mib": "tensors",
    "mps_sampled_allocated_mib": "Apple GPU, sampled",
    "process_peak_growth_mib": "growth of the process",
}
PARTS = ("weights", "adapter", "gradients", "moments", "activations")


def phases(trial: Mapping[str, Any], study: Mapping[str, Any]) -> pd.DataFrame:
    """One row a phase of which anything is known.

    Columns: phase, seconds, peak (MiB), kind (what the peak is of), predicted (MiB: of the trial alone in a pass),
    in_pass (MiB: predicted of the pass that it shared), error (percent that this is above the peak). NaN: not known.

    Args:
        trial: metrics of the trial by name, as in `frames.trials`.
        study: metrics of the study's run, which has the loading of the base that all trials share.
    """
    rows = []
    for phase in PHASES:
        found: dict[str, Any] = {"phase": phase, "seconds": _get(trial, f"seconds/{phase}", study), "kind": ""}
        kind = next((kind for kind in MEASURED if pd.notna(_get(trial, f"{kind}/{phase}", study))), None)
        found["peak"] = _get(trial, f"{kind}/{phase}", study)
        found["kind"] = MEASURED.get(kind or "", "")
        found["predicted"] = _get(trial, f"predicted_peak_mib/{phase}", study)
        found["in_pass"] = _get(trial, f"predicted_pass_mib/{phase}", {}) or float("nan")  # 0: nothing was predicted
        found["error"] = _get(trial, f"prediction_error_percent/{phase}", {})
        if any(pd.notna(found[name]) for name in ("seconds", "peak", "predicted")):
            rows.append(found)
    columns = ["phase", "seconds", "peak", "kind", "predicted", "in_pass", "error"]
    return pd.DataFrame(rows, columns=columns)


def parts(trial: Mapping[str, Any]) -> pd.DataFrame:
    """What the training step was predicted to hold: columns part, mib."""
    found = [(part, _get(trial, f"predicted_mib/{part}", {})) for part in PARTS]
    return pd.DataFrame([row for row in found if pd.notna(row[1])], columns=["part", "mib"])


def _get(trial: Mapping[str, Any], name: str, study: Mapping[str, Any]) -> float:
    value = trial.get(name)
    return float(value if value is not None and pd.notna(value) else study.get(name, float("nan")))

"""The table of a study's trials, best first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from .frames import ranked
from .outcomes import spelt, tally

if TYPE_CHECKING:
    import pandas as pd

MEMORY = {  # what is shown as memory, the first that was measured
    "cuda_peak_allocated_mib/train": "CUDA peak, MiB",
    "tensor_peak_mib/train": "tensors' peak, MiB",
    "process_peak_growth_mib/train": "process growth, MiB",
    "peft_memory_max_mib/published": "peft's maximum, MiB",
}
PREDICTED = {  # heading and format
    "predicted_peak_mib/train": ("predicted, MiB", ".0f"),
    "prediction_error_percent/train": ("off by, %", "+.1f"),
}


def leaderboard(trials: pd.DataFrame, study: str, metric: str, goal: str, split: str = "validation") -> Table:
    """A table for a terminal: rank, method, searched hyperparameters, metric, parameters, memory (measured and
    predicted, where it was), time, outcome."""
    memory = next((key for key in MEMORY if key in trials), "")
    table = Table(title=f"{study}: {goal} {split} {metric}", title_justify="left")
    for name in ("rank", "trial"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    table.add_column("hyperparameters", min_width=24)
    for name in (metric, "trainable", MEMORY.get(memory, "memory")):
        table.add_column(name, justify="right")
    foreseen = [name for name in PREDICTED if name in trials]
    for name in foreseen:
        table.add_column(PREDICTED[name][0], justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("outcome")
    for _, trial in ranked(trials, goal).iterrows():
        table.add_row(
            str(trial["rank"] or ""),
            str(trial["number"]),
            trial["label"],
            ", ".join(f"{name}={brief(trial[f'hp.{name}'])}" for name in trial["searched"].split()),
            f"{trial['objective']:.4f}" if there(trial["objective"]) else "",
            f"{trial['trainable_params']:,}" if there(trial["trainable_params"]) else "",
            f"{trial[memory]:.0f}" if memory and there(trial[memory]) else "",
            *(f"{trial[name]:{PREDICTED[name][1]}}" if there(trial[name]) else "" for name in foreseen),
            f"{trial['seconds/total']:.1f}" if there(trial.get("seconds/total")) else "",
            spelt(trial["outcome"]) + what(trial),
            style="bold" if trial["rank"] == 1 else None,
        )
    return table


def what(trial: pd.Series) -> str:
    """What is special about a trial."""
    if trial["resumes"]:
        return f", resumes {trial['resumes']}"
    return {"finalist": f", repeats {trial['finalist_of']}", "default": ", defaults"}.get(trial["role"], "")


def there(value: object) -> bool:
    """Whether a cell holds anything: neither None, NaN, NA nor empty text."""
    import pandas as pd

    return not pd.isna(value) and value != ""


def brief(value: object) -> str:
    """A hyperparameter in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def outcomes(trials: pd.DataFrame) -> str:
    """How the trials ended, counted."""
    return tally(trials["outcome"])

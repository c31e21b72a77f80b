"""The table of a study's trials, best first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

MEMORY = {  # what is shown as memory, the first that was measured
    "cuda_peak_allocated_mib/train": "CUDA peak, MiB",
    "process_peak_growth_mib/train": "process growth, MiB",
}


def ranked(trials: pd.DataFrame, goal: str) -> pd.DataFrame:
    """The trials of `frames.trials`, complete ones by their objective, then the others by number; column `rank` from
    1."""
    complete = trials["outcome"] == "complete"
    best_first = trials[complete].sort_values("objective", ascending=goal == "minimize", kind="stable")
    ordered = [*best_first.index, *trials.index[~complete]]
    return trials.loc[ordered].assign(rank=[*range(1, len(best_first) + 1), *[0] * (len(trials) - len(best_first))])


def leaderboard(trials: pd.DataFrame, study: str, metric: str, goal: str) -> Table:
    """A table for a terminal: rank, method, searched hyperparameters, metric, parameters, memory, time, outcome."""
    memory = next((key for key in MEMORY if key in trials), "")
    table = Table(title=f"{study}: {goal} validation {metric}", title_justify="left")
    for name in ("rank", "trial"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    table.add_column("hyperparameters", overflow="fold")
    for name in (metric, "trainable", MEMORY.get(memory, "memory"), "seconds"):
        table.add_column(name, justify="right")
    table.add_column("outcome")
    varied = searched(trials)
    for _, trial in ranked(trials, goal).iterrows():
        table.add_row(
            str(trial["rank"] or ""),
            str(trial["number"]),
            trial["label"],
            ", ".join(
                f"{name}={brief(trial[f'hp.{name}'])}" for name in varied[trial["label"]] if there(trial[f"hp.{name}"])
            ),
            f"{trial['objective']:.4f}" if there(trial["objective"]) else "",
            f"{trial['trainable_params']:,}" if there(trial["trainable_params"]) else "",
            f"{trial[memory]:.0f}" if memory and there(trial[memory]) else "",
            f"{trial['seconds/total']:.1f}" if there(trial.get("seconds/total")) else "",
            trial["outcome"],
            style="bold" if trial["rank"] == 1 else None,
        )
    return table


def searched(trials: pd.DataFrame) -> dict[str, list[str]]:
    """The hyperparameters that differ between the trials of a label; all of them where there is one trial only."""
    columns = [column for column in trials if str(column).startswith("hp.")]
    return {
        str(label): [
            str(column).removeprefix("hp.")
            for column in columns
            if rows[column].astype(str).nunique() > 1 or (len(rows) == 1 and there(rows[column].iloc[0]))
        ]
        for label, rows in trials.groupby("label")
    }


def there(value: object) -> bool:
    """Whether a cell holds anything: neither None, NaN, NA nor empty text."""
    import pandas as pd

    return not pd.isna(value) and value != ""  # type: ignore[call-overload, no-any-return]


def brief(value: object) -> str:
    """A hyperparameter in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def outcomes(trials: pd.DataFrame) -> str:
    """How the trials ended, counted."""
    return ", ".join(f"{count} {outcome}" for outcome, count in trials["outcome"].value_counts().items())

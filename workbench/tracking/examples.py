"""What trials predicted of each example of the validation split, as `workbench/training/examples.py` wrote it."""

from __future__ import annotations

import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from workbench.errors import DataError

NEEDED = {"row", "actual", "predicted", "loss"}


def errors(table: pd.DataFrame) -> pd.DataFrame:
    """The examples with what was wrong, the highest loss first.

    Columns: row, actual, predicted, loss, wrong (missing where the task has no answer to compare with).

    Raises:
        DataError: columns are missing.
    """
    if missing := NEEDED - set(table.columns):
        raise DataError(f"The predictions have no column {', '.join(sorted(missing))}.")
    known = table["actual"].notna() & table["predicted"].notna()
    wrong = (table["actual"] != table["predicted"]).astype("boolean").where(known)
    found = table[["row", "actual", "predicted", "loss"]].assign(wrong=wrong)
    return found.sort_values("loss", ascending=False, kind="stable", ignore_index=True)


def place(study_file: str) -> str:
    """Where the rows lie, in words: rows count from 0 in this split.

    Args:
        study_file: the text of the study file; of one that cannot be read the split is not named.
    """
    try:
        data = YAML(typ="safe", pure=True).load(study_file)["data"]
        if "validation" in data:
            within = f" of {data['path']}" if "path" in data else ""
            return f"rows of {data['validation']}{within}, counted from 0"
        return f"rows of the validation split of {data.get('path') or data['train']}, counted from 0"
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError):
        return "rows of the validation split, counted from 0"


def confusion(found: pd.DataFrame, most: int = 30) -> pd.DataFrame:
    """How often each label was answered by which: columns actual, predicted, count, share (of the actual one's).

    Empty where the answers are no labels: more than `most` different ones.
    """
    known = found.dropna(subset=["actual", "predicted"])
    columns = ["actual", "predicted", "count", "share"]
    if not 1 < pd.concat([known["actual"], known["predicted"]]).nunique() <= most:
        return pd.DataFrame(columns=columns)
    counts = known.groupby(["actual", "predicted"]).size().rename("count").reset_index()
    counts["share"] = counts["count"] / counts.groupby("actual")["count"].transform("sum")
    return counts[columns]


def changed(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The examples that one trial answers otherwise than another.

    Columns: row, actual, predicted and predicted_other, loss and loss_other, became: "right" where only the other one
    is right, "wrong" where only the first is, "other" where both are wrong; the largest change of loss first.

    Args:
        one, other: as `errors` returns them.

    Raises:
        DataError: they are not of the same examples.
    """
    if sorted(one["row"]) != sorted(other["row"]):
        raise DataError("The two trials were not measured on the same examples.")
    both = one.merge(other, on="row", suffixes=("", "_other"))
    both = both[both["wrong"].notna() & both["wrong_other"].notna() & (both["predicted"] != both["predicted_other"])]
    became = pd.Series("other", index=both.index, dtype="str")
    became = became.mask(both["wrong"] & ~both["wrong_other"], "right").mask(
        ~both["wrong"] & both["wrong_other"], "wrong"
    )
    order = (both["loss_other"] - both["loss"]).abs().sort_values(ascending=False, kind="stable").index
    columns = ["row", "actual", "predicted", "predicted_other", "loss", "loss_other", "became"]
    return both.assign(became=became).loc[order, columns].reset_index(drop=True)

"""Metrics by task. Importing this file imports neither torch nor scikit-learn: a study file is checked quickly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from .config import Task

Goal = Literal["maximize", "minimize"]

# `exact_match` and `chrf` of CAUSAL_LM exist only where the data names a target
METRICS: dict[Task, dict[str, Goal]] = {
    "SEQ_CLS": {"accuracy": "maximize", "f1": "maximize", "mcc": "maximize", "loss": "minimize"},
    "TOKEN_CLS": {"f1": "maximize", "accuracy": "maximize", "loss": "minimize"},
    "CAUSAL_LM": {
        "loss": "minimize",
        "perplexity": "minimize",
        "accuracy": "maximize",
        "exact_match": "maximize",
        "chrf": "maximize",
    },
    "SEQ_2_SEQ_LM": {"chrf": "maximize", "exact_match": "maximize", "loss": "minimize"},
}
BIO = re.compile(r"O|[BI]-.+")


def score_classes(predicted: Sequence[str], actual: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 averaged over classes, and Matthews' correlation coefficient."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(actual, predicted)),
        "f1": float(f1_score(actual, predicted, average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(actual, predicted)),
    }


def score_tags(predicted: Sequence[Sequence[str]], actual: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy over words, and F1 over entities: one counts as found if its tag, first and last word are right."""
    pairs = [pair for p, a in zip(predicted, actual, strict=True) for pair in zip(p, a, strict=True)]
    found = [entities(row) for row in predicted]
    there = [entities(row) for row in actual]
    right = sum(len(f & t) for f, t in zip(found, there, strict=True))
    total = sum(map(len, found)) + sum(map(len, there))
    return {"accuracy": sum(p == a for p, a in pairs) / len(pairs), "f1": 2 * right / total if total else 0.0}


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Entities `(first, last + 1, name)` of a row: from each `B-` on if the tags are BIO, else every run of equal tags.

    Words tagged `O` belong to none. An `I-` that follows no word of its own kind starts an entity, as in conlleval.
    """
    bio = all(BIO.fullmatch(tag) for tag in tags)
    spans: list[tuple[int, int, str]] = []
    for i, tag in enumerate(tags):
        name = tag[2:] if bio and tag != "O" else tag
        continues = bool(spans) and spans[-1][1:] == (i, name) and not (bio and tag.startswith("B-"))
        if tag == "O":
            continue
        if continues:
            spans[-1] = (spans[-1][0], i + 1, name)
        else:
            spans.append((i, i + 1, name))
    return set(spans)


def score_texts(predicted: Sequence[str], actual: Sequence[str]) -> dict[str, float]:
    """Share of texts that are right but for white space, and chrF (0 to 100) of the whole set."""
    from sacrebleu.metrics import CHRF

    same = [" ".join(p.split()) == " ".join(a.split()) for p, a in zip(predicted, actual, strict=True)]
    return {"exact_match": sum(same) / len(same), "chrf": CHRF().corpus_score(predicted, [actual]).score}

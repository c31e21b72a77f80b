"""The model card of a registered version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from workbench import __version__

from .compare_formats import number

TEMPLATES = Path(__file__).parent / "templates"
TAKES = {
    "SEQ_CLS": "a text, and answers with its class",
    "TOKEN_CLS": "a list of words, and answers with a tag for each",
    "CAUSAL_LM": "a text, and goes on from there",
    "SEQ_2_SEQ_LM": "a text, and answers with another",
}


def card(model: str, alias: str, facts: Mapping[str, str], columns: Sequence[str]) -> str:
    """A card in Markdown.

    Args:
        model, alias: the name under which the version is registered; alias "" for none.
        facts: see `workbench.sweep.register.describe`.
        columns: of the input.
    """
    metrics, examples = json.loads(facts["metrics"]), json.loads(facts["examples"])
    rows = [
        (split, metric, *map(number, values), examples[split])
        for split in metrics
        for metric, values in metrics[split].items()
    ]
    page = Environment(loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return page.get_template("card.md").render(
        model=model,
        uri=f"models:/{model}@{alias}" if alias else f"models:/{model}/VERSION",
        facts=facts,
        takes=TAKES[facts["task"]],
        labels=json.loads(facts["labels"]),
        hyperparameters=json.loads(facts["hyperparameters"]),
        rows=rows,
        columns=columns,
        version=__version__,
    )

"""What a study shows, as one HTML file that needs neither a network nor a script."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader

from workbench import __version__

from .budgets import counted, failures
from .compare_formats import columns, is_best, number, signed, title
from .comparison import Comparison, Row, compare
from .figures import Looks, pictures
from .frames import study_run
from .outcomes import tally
from .runs import open_client, storage_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

ENVIRONMENT = "workbench.env."
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Pair:
    """A finalist beside the best, in words: difference and interval, the bootstrap's interval, p."""

    name: str
    difference: str
    bootstrap: str
    p: str
    tied: bool


@dataclass(frozen=True)
class Method:
    """What the search of one method used, and how its trials ended."""

    name: str
    trials: int
    outcomes: str
    steps: int
    seconds: float


def report(tracking_uri: str, study: str) -> str:
    """The report of a study.

    Raises:
        StorageError: the store cannot be read, or holds no such study.
        DataError: predictions of finalists are damaged, or not of the same examples.
    """
    found = compare(tracking_uri, study)
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri), tempfile.TemporaryDirectory() as folder:
        run = study_run(client, tracking_uri, study)
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        file = client.download_artifacts(run.info.run_id, "study.yaml", folder) if "study.yaml" in files else None
        text = Path(file).read_text(encoding="utf-8") if file else ""
    page = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("report.html").render(
        title=title(found),
        found=found,
        columns=columns(found),
        is_best=is_best,
        looks=Looks([*found.trials["label"], *(row.label for row in found.rows)]),
        pairs=[pair(row) for row in found.rows if row.judged],
        pictures=pictures(found),
        methods=methods(found),
        failures=failures(found.trials).most_common(),
        facts=facts(run),
        file=text,
        version=__version__,
    )


def pair(row: Row) -> Pair:
    """The words for one finalist."""
    judged = row.judged
    if judged is None or judged.behind is None:
        return Pair(row.name, "best", "", "", True)
    difference, bootstrap, p = judged.behind.difference, judged.behind.bootstrap, judged.behind.p
    return Pair(
        row.name,
        f"{signed(difference.value)} [{signed(difference.low)}, {signed(difference.high)}]",
        f"[{signed(bootstrap.low)}, {signed(bootstrap.high)}]",
        "< 0.001" if p < 0.001 else number(p),
        judged.tied,
    )


def methods(found: Comparison) -> list[Method]:
    """The budget of each method."""
    trials, made = counted(found.trials), []
    for label, used in found.used.items():
        ended = tally(trials.loc[trials["label"] == label, "outcome"])
        made.append(Method(label, used.trials, ended, used.steps, used.seconds))
    return made


def facts(run: Run) -> dict[str, str]:
    """What the results depend on: where the study ran, then its settings. Of folders only the name is told, since a
    report is for others to read."""
    tags = run.data.tags
    environment = {key.removeprefix(ENVIRONMENT): tags[key] for key in sorted(tags) if key.startswith(ENVIRONMENT)}
    params = {key: Path(value).name if Path(value).is_absolute() else value for key, value in run.data.params.items()}
    return environment | dict(sorted(params.items()))

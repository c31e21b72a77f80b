"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.errors import StudyError, WorkbenchError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from workbench.sweep.display import Display
    from workbench.sweep.spec import Study
    from workbench.sweep.stores import Stores
    from workbench.tracking.registry import Version

app = typer.Typer(
    help="Find the best parameter-efficient fine-tuning method for a model, a data set and a memory budget.",
    epilog="Start with: workbench sweep studies/quickstart.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

StudyFile = Annotated[Path, typer.Argument(help="A study file, e.g. studies/quickstart.yaml.", show_default=False)]
Home = Annotated[
    Path,
    typer.Option(envvar="WORKBENCH_HOME", help="Folder of the embedded stores: Optuna's, MLflow's, artifacts, caches."),
]
TrackingUri = Annotated[
    str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="An MLflow server, in place of the embedded store.")
]
Storage = Annotated[
    str | None, typer.Option(envvar="WORKBENCH_STORAGE", help="Optuna's storage URL, in place of the embedded store.")
]
Trials = Annotated[int | None, typer.Option(min=1, help="Trials in all, in place of the file's budget.trials.")]
Heartbeat = Annotated[
    int,
    typer.Option(
        envvar="WORKBENCH_HEARTBEAT",
        min=1,
        help="Seconds between two signs of life; after four without one, other workers take over.",
    ),
]
MaxFailures = Annotated[
    int, typer.Option(min=1, help="Stop when so many trials in a row have failed: the cause is not theirs.")
]
Format = Literal["table", "markdown", "latex", "csv"]
Split = Literal["test", "validation"]
Launcher = Literal["processes", "ray", "slurm"]
ExportFormat = Literal["peft", "merged"]
SchemaFormat = Literal["json", "markdown"]
RUNS = Path("runs")
HEARTBEAT = 15
MAX_FAILURES = 20
COMMAND = os.environ.get("WORKBENCH_COMMAND", "workbench")  # how the user called; workbench.sh says its own name
PLAIN_WIDTH = 160  # columns of a table that goes to a file or a log


@app.command()
def sweep(
    study: StudyFile,
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
    trials: Trials = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that train. Default: one a core on a CPU; one a GPU; with a launcher one.",
            show_default=False,
        ),
    ] = None,
    launcher: Annotated[
        Launcher | None,
        typer.Option(
            help="Place workers as processes of their own (default with several GPUs), by Ray, or by Slurm.",
            show_default=False,
        ),
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What each worker gets: an option of Ray's tasks (num_gpus=1), a parameter of submitit "
            "(slurm_partition=gpu). Repeatable.",
            show_default=False,
        ),
    ] = None,
    resume_trial: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Take this pruned trial up again, to its last step. Repeatable.", show_default=False),
    ] = None,
    solo: Annotated[
        bool, typer.Option("--solo", help="Train one trial after the other, with plain loops: undisturbed timings.")
    ] = False,
    max_failures: MaxFailures = MAX_FAILURES,
    heartbeat: Heartbeat = HEARTBEAT,
) -> None:
    """Run a study: search methods and hyperparameters, train each trial, rank them.

    The same command goes on where a study was stopped, by Ctrl-C or a crash; a finished study says so.
    """
    from rich.console import Console

    from workbench.sweep.display import Display
    from workbench.sweep.edges import edges
    from workbench.sweep.run import sweep as run
    from workbench.sweep.spec import load_study
    from workbench.sweep.storage import patiently
    from workbench.tracking import frames
    from workbench.tracking.leaderboard import leaderboard, outcomes

    if solo and (workers or resume_trial or launcher):
        raise typer.BadParameter("--solo goes with no --workers, --launcher or --resume-trial")
    if launcher and resume_trial:
        raise typer.BadParameter("--resume-trial goes without --launcher")
    if resource and not launcher:
        raise typer.BadParameter("--resource goes with --launcher")
    if wrong := [pair for pair in resource or () if not pair.partition("=")[2]]:
        raise typer.BadParameter(f"--resource {wrong[0]} is not KEY=VALUE")
    resources = {key: value for key, _, value in (pair.partition("=") for pair in resource or ())}
    loaded = limited(load_study(study), trials)
    where = stores(home, tracking_uri, storage, heartbeat)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    placed = launcher or (
        "processes" if not (solo or resume_trial) and on_gpus(loaded.training.device, workers) else None
    )
    with Display(loaded, console).open() as display:
        try:
            if placed:
                ended = launch(loaded, where, display, placed, workers, resources, max_failures, trials)
            else:
                ended = run(
                    loaded,
                    where,
                    display,
                    workers=workers,
                    alone=solo,
                    pruned=resume_trial or (),
                    max_failures=max_failures,
                )
        except KeyboardInterrupt:
            display.say("stopped; nothing is lost: the same command goes on from here")
            raise typer.Exit(130) from None
    table, objective = patiently(lambda: frames.trials(where.tracking, loaded.name)), loaded.objective
    console.print(leaderboard(table, loaded.name, objective.metric, objective.goal))
    display.say(f"{len(table)} trials: {outcomes(table)}")
    for advice in edges(loaded, ended):
        display.say(f"note: {advice}")
    winner = frames.ranked(table, objective.goal).iloc[0]
    if loaded.registration and (table["outcome"] == "complete").any():
        enter_registry(loaded, where, display)
    if winner["outcome"] != "complete":
        display.say("no trial is complete: the messages above say why; tracebacks are artifacts of the runs in MLflow")
        raise typer.Exit(1)
    display.say(f"\nBest: trial {winner['number']}, {objective.metric} {winner['objective']:.4f}. Next:")
    stored, entered = store_options(home, tracking_uri), loaded.registration
    finalists = (table["role"] == "finalist").any() and not entered  # ... whose test split has been read by now
    if entered:
        champion = f"models:/{entered.name or loaded.name}@{entered.alias}"
        use = {"predict with the champion": ["predict", champion, "--input", "rows.csv", *stored]}
    else:
        named = ["--name", loaded.name, "--alias", "champion"]
        use = {"make the best one a model that can be served": ["register", loaded.name, *named, *stored]}
    for what, words in {
        "compare the methods, with intervals and ties": ["compare", loaded.name, *stored],
        **({"measure the finalists on the test split, once": ["promote", loaded.name, *stored]} if finalists else {}),
        **use,
        "look at the trials in a browser": ["dashboard", *stored],
        "see this table again": ["show", loaded.name, *stored],
        "after changing the file, and the study's name in it": ["validate", str(study)],
    }.items():
        display.say(f"  {COMMAND} {shlex.join(words)}  # {what}")


def enter_registry(study: Study, where: Stores, display: Display) -> None:
    """Register the best trial, if it beats the champion. A sweep that went well stays one if this does not."""
    from workbench.sweep.champion import compete

    try:
        display.say(f"registry: {compete(study, where, display.say)}")
    except WorkbenchError as error:
        display.say(f"registry: nothing was registered. {error}")


def on_gpus(device: str, workers: int | None) -> bool:
    """Whether to have one worker a GPU."""
    from workbench.sweep.launch import gpus
    from workbench.training.base import pick_device

    picked = pick_device(device)
    return picked.type == "cuda" and picked.index is None and (workers or len(gpus())) > 1


def launch(
    study: Study,
    where: Stores,
    display: Display,
    name: Launcher,
    workers: int | None,
    resources: dict[str, str],
    max_failures: int,
    trials: int | None,
) -> list[FrozenTrial]:
    """Run a study by workers that are placed."""
    from workbench.sweep.launch import gpus, launched, launcher, logs

    count = workers or (len(gpus()) or 1 if name == "processes" else 1)
    words = ["--max-failures", str(max_failures), *(["--trials", str(trials)] if trials else [])]
    return launched(study, where, display, launcher(name, logs(where.home, study.name), resources), count, words)


@app.command()
def worker(
    study: Annotated[
        str, typer.Argument(help="A study file, or the name of a study that was begun.", show_default=False)
    ],
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
    trials: Trials = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes of this worker. Default: one a core on a CPU, elsewhere one.", show_default=False
        ),
    ] = None,
    max_failures: MaxFailures = MAX_FAILURES,
    heartbeat: Heartbeat = HEARTBEAT,
) -> None:
    """Join a study: take trials, train them, record them, until none is left. Any number of workers, on any machines.

    They need one Optuna storage and one MLflow server, e.g. --storage postgresql+psycopg://me@host/optuna
    --tracking-uri http://host:5000, and the model and the data at the study file's paths. On one machine the embedded
    stores will do. What a worker leaves unfinished when it dies another one goes on with.
    """
    from workbench.sweep.launch_worker import heed_launcher

    heed_launcher()
    from rich.console import Console

    from workbench.sweep.display import Display
    from workbench.sweep.run import work
    from workbench.sweep.spec import load_study
    from workbench.tracking.recorded import recorded_study

    where = stores(home, tracking_uri, storage, heartbeat)
    if Path(study).suffix or Path(study).exists():
        loaded = load_study(Path(study))
    else:
        known = recorded_study(where.tracking, study)
        loaded = load_study(known.file, known.text)
    loaded = limited(loaded, trials)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    with Display(loaded, console).open() as display:
        try:
            work(loaded, where, display, workers, max_failures)
        except KeyboardInterrupt:
            display.say("stopped; its trials are left to other workers, or to the next one")
            raise typer.Exit(130) from None


def limited(study: Study, trials: int | None) -> Study:
    """A study with another number of trials, if one is given."""
    if trials is None:
        return study
    return study.model_copy(update={"budget": study.budget.model_copy(update={"trials": trials})})


@app.command()
def validate(study: StudyFile) -> None:
    """Check a study file; list every problem with its line and column."""
    from workbench.sweep.space import combinations
    from workbench.sweep.spec import load_study

    loaded = load_study(study)
    number = combinations(loaded)
    size = "continuous" if number is None else f"{number:,} configurations"
    typer.echo(f"{study} is right: study {loaded.name}, methods {', '.join(loaded.methods)}, search space {size}")


@app.command()
def plan(
    study: StudyFile,
    device: Annotated[
        str | None, typer.Option(help="Plan for this device (cpu, cuda ...), be it here or not.", show_default=False)
    ] = None,
    vram_gib: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB that a pass may take, in place of the file's.", show_default=False),
    ] = None,
    measure: Annotated[
        int, typer.Option(min=0, help="Train so many steps of each method, with the weights, to tell the time.")
    ] = 0,
    home: Home = RUNS,
    storage: Storage = None,
) -> None:
    """Show what a study will need before it runs: parameters, bytes, peaks of memory, what does not fit, and why.

    Of each method the corners of its search space are rehearsed on tensors without data: no weights are read and no GPU
    is needed. With trials of this study in the store, or with --measure, it also tells the time.
    """
    from rich.console import Console

    from workbench.sweep.plan import plan as make
    from workbench.sweep.plan_table import rendered
    from workbench.sweep.spec import load_study

    loaded = load_study(study)
    progress = Console(stderr=True, highlight=False)
    with progress.status("planning ...") as status:
        made = make(loaded, stores(home, None, storage), status.update, device, vram_gib, measure)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    for part in rendered(made, os.cpu_count() or 1):
        console.print(part, soft_wrap=isinstance(part, str), markup=not isinstance(part, str))
    if not any(not verdict.refusal for verdict in made.verdicts):
        raise typer.Exit(1)


@app.command()
def schema(
    format: Annotated[
        SchemaFormat, typer.Option(help="json: the schema. markdown: a page that lists every key.")
    ] = "json",
) -> None:
    """Print the JSON schema of study files, for editors that check and complete YAML."""
    from workbench.sweep.schema import json_schema
    from workbench.sweep.schema_page import page

    typer.echo(page() if format == "markdown" else json.dumps(json_schema(), indent=2))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show the fields of this method.", show_default=False)] = None,
) -> None:
    """List the methods, or the fields that a study can set and search for one."""
    from rich.console import Console
    from rich.table import Table

    from workbench.adapters import METHODS
    from workbench.sweep.baselines import BASELINES, CHOICES
    from workbench.sweep.domains import did_you_mean
    from workbench.sweep.fields import fields

    if name is None:
        table = Table("method", "what it is", "name in files", "adapts", caption="workbench methods NAME: its fields")
        for method in METHODS.values():
            kinds = ", ".join(sorted(method.kinds)) or "the input"
            table.add_row(method.name, method.title, method.config.peft_type, kinds)
        for baseline in BASELINES.values():
            table.add_row(baseline.name, baseline.title, "LORA", baseline.trains)
    elif name not in CHOICES:
        hint = did_you_mean(name, CHOICES) or f"known: {', '.join(CHOICES)}"
        raise WorkbenchError(f"There is no method {name!r} ({hint}).")
    else:
        table = Table("field", "what it is", title=CHOICES[name].title, title_justify="left")
        for field in fields(name).values():
            table.add_row(field.name, field.description)
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


@app.command()
def show(
    study: Annotated[str, typer.Argument(help="A study's name.", show_default=False)],
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print a study's trials, best first, as MLflow holds them."""
    from rich.console import Console

    from workbench.tracking import frames
    from workbench.tracking.leaderboard import leaderboard, outcomes

    uri = stores(home, tracking_uri, None).tracking
    table = frames.trials(uri, study)
    about = frames.studies(uri).set_index("study").loc[study]
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(leaderboard(table, study, about["metric"], about["goal"], about["split"]))
    console.print(f"{len(table)} trials: {outcomes(table)}", highlight=False)
    if about["reference"]:
        source = f"imported from {about['reference']}: as published, one run each"
        console.print(source, highlight=False, soft_wrap=True)


@app.command()
def compare(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY", help="Names of studies.", show_default=False)],
    format: Annotated[Format, typer.Option(help="For a terminal, GitHub, a paper, a program.")] = "table",
    split: Annotated[
        Split | None,
        typer.Option(help="Which split's values. Default: test if it was read.", show_default=False),
    ] = None,
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Compare the methods of studies: intervals, ties, what failed and why, ready for a paper."""
    from rich.console import Console

    from workbench.tracking import compare_formats as formats
    from workbench.tracking.comparison import compare as made

    uri = stores(home, tracking_uri, None).tracking
    found = [made(uri, study, split) for study in studies]
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    if format == "csv":
        typer.echo(formats.comma_separated(found), nl=False)
    for one in found:
        if format == "table":
            console.print(formats.table(one))
            for note in one.notes:
                console.print(f"- {note}", markup=False)
        elif format == "csv":
            typer.echo("".join(f"{one.study}: {note}\n" for note in one.notes), err=True, nl=False)
        else:
            typer.echo(formats.markdown(one) if format == "markdown" else formats.latex(one))


@app.command()
def report(
    study: Annotated[str, typer.Argument(help="A study's name.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: the study's name with .html.", show_default=False)
    ] = None,
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write what a study shows to one HTML file that needs nothing else: tables, figures, budgets, failures."""
    from workbench.tracking.report import report as made

    file = output or Path(f"{study}.html")
    text = made(stores(home, tracking_uri, None).tracking, study)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise WorkbenchError(f"{file} cannot be written: {error.strerror}.") from error
    typer.echo(f"{file}: {len(text) / 1024:,.0f} KiB")


@app.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="A study's name.", show_default=False)],
    trial: Annotated[int, typer.Option(min=0, help="The trial's number.", show_default=False)],
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far a metric may be off, relative where it is above 1.")
    ] = 1e-3,
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train a trial again from what MLflow holds of it, and say whether its metrics agree.

    The study file is taken as it was, the model and the data must be the same. Nothing is recorded. The exit code is 1
    if a metric is further off than the tolerance.
    """
    from rich.console import Console
    from rich.table import Table

    from workbench.sweep.reproduce import reproduce as again

    progress = Console(stderr=True, highlight=False)
    with progress.status(f"training trial {trial} of {study} again ...") as status:
        came = again(
            study,
            trial,
            stores(home, tracking_uri, None),
            lambda _, step, loss: status.update(f"trial {trial} of {study}: step {step}, loss {loss:.4f}"),
        )
    varied = ", ".join(f"{key}={value}" for key, value in came.config.describe().items())
    table = Table(
        "validation", "recorded", "again", "off by", title=f"{study}, trial {trial}, step {came.step}: {varied}"
    )
    for name, before in came.before.items():
        table.add_row(name, f"{before:.6f}", f"{came.now[name]:.6f}", f"{came.now[name] - before:+.1e}")
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    console.print(table)
    far = came.differs(tolerance)
    console.print(f"{', '.join(far)} differ by more than {tolerance:g}" if far else f"the same within {tolerance:g}")
    if far:
        raise typer.Exit(1)


@app.command()
def promote(
    study: Annotated[str, typer.Argument(help="A study's name.", show_default=False)],
    again: Annotated[
        str, typer.Option(metavar="WHY", help="Read the test split once more, for this reason.", show_default=False)
    ] = "",
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Measure a study's finalists on the test split, once, when the search is over.

    Nothing else reads that split, but `register` in a study file, which does this first. MLflow records every reading,
    and `compare` says how many there were.
    """
    from rich.console import Console

    from workbench.sweep.promote import promote as read_test

    progress = Console(stderr=True, highlight=False)
    with progress.status("") as status:
        reading = read_test(study, stores(home, tracking_uri, None), status.update, again)
    typer.echo(f"{len(reading.trials)} trials of {study} were measured on the test split; the reading is recorded")
    typer.echo(f"  {COMMAND} {shlex.join(['compare', study, *store_options(home, tracking_uri)])}  # the result")


@app.command()
def register(
    study: Annotated[str, typer.Argument(help="A study's name.", show_default=False)],
    name: Annotated[str, typer.Option(help="The registered model.", show_default=False)],
    best: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Take the trial that is best by this validation metric. Default: the configuration that `compare` has "
            "first, of its runs the best.",
            show_default=False,
        ),
    ] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Take this trial.", show_default=False)] = None,
    alias: Annotated[str, typer.Option(help="Let this alias point at the new version.", show_default=False)] = "",
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Make a trial a version of a model in MLflow's registry: its adapter, its tokenizer, and how to use them.

    The version is loaded again first, and must predict on validation what the trial predicted.
    """
    from rich.console import Console

    from workbench.sweep.register import register as make

    if best and trial is not None:
        raise typer.BadParameter("--best goes without --trial")
    where = stores(home, tracking_uri, None)
    with Console(stderr=True, highlight=False).status("") as status:
        made = make(study, where, name, alias, status.update, trial, best)
    announce(made, alias, home, tracking_uri)


def announce(made: Version, alias: str, home: Path, tracking_uri: str | None) -> None:
    """Say what was registered, and how it is used."""
    facts, stored = made.facts, store_options(home, tracking_uri)
    uri = f"models:/{made.name}@{alias}" if alias else made.uri
    typer.echo(f"{uri} is version {made.number}: trial {facts['trial']} of {facts['study']}, {facts['label']}")
    typer.echo(f"{facts['parity']}. Next:")
    for what, words in {
        "predict": ["predict", uri, "--input", "rows.csv", *stored],
        "see its versions in a browser": ["dashboard", *stored],
    }.items():
        typer.echo(f"  {COMMAND} {shlex.join(words)}  # {what}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.", show_default=False)],
    input: Annotated[
        str, typer.Option("--input", "-i", help="Rows: a .csv or .jsonl file; - reads JSON lines.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .csv or .jsonl file. Default: JSON lines.", show_default=False),
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Of every class.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of texts. Default: as in the study.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the base model, where it is not as recorded.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Predict rows with a registered version, as they come: no file is too long.

    The columns of the input are those of the study's data; they stand in the output too, before the prediction. No code
    of the version is run.
    """
    from rich.console import Console

    from workbench.serving.stream import predict as run
    from workbench.tracking import registry

    uri = stores(home, tracking_uri, None).tracking
    with Console(stderr=True, highlight=False).status("loading the model ...") as status, TemporaryDirectory() as place:
        folder = registry.fetch(uri, registry.find(uri, model), Path(place))
        count = run(
            folder,
            input,
            output,
            lambda rows: status.update(f"{rows:,} rows"),
            base=base,
            device=device,
            probabilities=probabilities,
            max_new_tokens=max_new_tokens,
        )
    print(f"{count:,} rows predicted{f' in {output}' if output else ''}", file=sys.stderr)


@app.command()
def export(
    study: Annotated[str, typer.Argument(help="A study's name.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.", show_default=False)],
    trial: Annotated[
        int | None, typer.Option(min=0, help="The trial's number. Default: the best.", show_default=False)
    ] = None,
    format: Annotated[
        ExportFormat, typer.Option(help="peft: the adapter. merged: the whole model, the adapter merged into it.")
    ] = "peft",
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a trial's adapter, or the base model with it merged in, for use without workbench.

    peft's `PeftModel.from_pretrained` loads the one, transformers' `from_pretrained` the other; so it does the
    tokenizer, which lies beside.
    """
    from rich.console import Console

    from workbench.sweep.export import export as write

    with Console(stderr=True, highlight=False).status("") as status:
        code = write(study, stores(home, tracking_uri, None), folder, format, status.update, trial)
    typer.echo(f"{folder}: load it with\n")
    typer.echo(code)


@app.command("import-results")
def import_results(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Folders of result files, e.g. peft/method_comparison/MetaMathQA/results, or single files.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="The study that they become.", show_default=False)],
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Import results that peft has published, as a reference study beside one's own.

    Every result becomes a trial. What was imported before is left as it is. No model is loaded and nothing is trained.
    """
    from rich.console import Console

    from workbench.tracking.outcomes import tally
    from workbench.tracking.reference import import_results as read
    from workbench.tracking.runs import open_tracking

    where = stores(home, tracking_uri, None)
    with Console(stderr=True, highlight=False).status(f"importing {', '.join(map(str, paths))} ..."):
        found = read(open_tracking(where.tracking, where.artifacts), name, paths)
    counts = tally(found.outcomes.elements())
    typer.echo(f"results read: {found.outcomes.total()} ({counts}); known before: {found.known}. Next:")
    for command, what in {"compare": "beside a study: name that too", "show": "all of them, best first"}.items():
        typer.echo(f"  {COMMAND} {shlex.join([command, name, *store_options(home, tracking_uri)])}  # {what}")


@app.command()
def dashboard(
    home: Home = RUNS,
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port on 127.0.0.1.")] = 8501,
) -> None:
    """Open the dashboard on 127.0.0.1: the trials of every study as a table and a chart."""
    from dashboards import launch

    where = stores(home, tracking_uri, storage)
    command, environment = launch(where.tracking, storage, port)
    typer.echo(f"dashboard: http://127.0.0.1:{port} (Ctrl-C stops it)")
    try:
        raise typer.Exit(subprocess.run(command, env=os.environ | environment, check=False).returncode)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def store_options(home: Path, tracking_uri: str | None) -> list[str]:
    """The options with which another command finds the same stores; what prints them may be a log, so no password."""
    from workbench.tracking.runs import public_url

    options = [] if home == RUNS else ["--home", str(home)]
    if tracking_uri and not os.environ.get("MLFLOW_TRACKING_URI"):
        options += ["--tracking-uri", public_url(tracking_uri)]
    return options


def stores(home: Path, tracking_uri: str | None, storage: str | None, heartbeat: int = HEARTBEAT) -> Stores:
    """Where things are kept: the embedded stores below `home`, but for those named by a URI."""
    from workbench.sweep.stores import Stores
    from workbench.tracking.runs import default_store

    home = home.resolve()
    tracking, artifacts = default_store(home)
    return Stores(
        home=home,
        optuna=storage or f"sqlite:///{home / 'optuna.db'}",
        tracking=tracking_uri or tracking,
        artifacts=None if tracking_uri else artifacts,
        heartbeat=heartbeat,
    )


def main() -> None:
    """The console command: a user's mistake is a message and exit code 2, never a traceback."""
    try:
        app(prog_name=COMMAND)
    except StudyError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        n = len(error.problems)
        print(f"{n} problem{'s' if n > 1 else ''}; nothing was run", file=sys.stderr)
        sys.exit(2)
    except WorkbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""A trial in the stores: Optuna's trial and MLflow's run, written together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from workbench.errors import AdapterError, CheckpointError, DataError, Diverged, OutOfMemory, TimedOut
from workbench.tracking.recorded import PARAMS, SIZE
from workbench.tracking.runs import Outcome, StudyRun, Tracking, TrialRun
from workbench.training.bench import Report
from workbench.training.memory import MIB

from .budget import PROGRESS
from .domains import Tokens
from .planning import Planner, Verdict
from .roles import OUTCOME, RESUMES, About
from .space import TrialConfig, brief
from .spec import Study

EXACT = ("cuda_peak_allocated_mib", "tensor_peak_mib")  # measured peaks that a prediction can be held against
INTERRUPTED = "stopped; the next `workbench sweep` of this study finishes it"


@dataclass
class Progress:
    """How far a trial came: step, metrics of the last evaluation, costs so far, training tokens so far, and its sizes:
    trainable_params, adapter_bytes, memory as predicted (MiB)."""

    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    sizes: dict[str, float] = field(default_factory=dict)

    def add(self, costs: Mapping[str, float]) -> None:
        """Costs of a further stretch: seconds add up, of peaks the highest counts."""
        for key, value in costs.items():
            before = self.costs.get(key, 0.0)
            self.costs[key] = before + value if key.startswith("seconds/") else max(before, value)

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(value for key, value in self.costs.items() if key.startswith("seconds/"))


@dataclass
class Books:
    """The stores of one study, open for writing."""

    study: Study
    optuna_study: optuna.Study
    tracking: Tracking
    parent: StudyRun
    data_fingerprint: str

    def begin(self, trial: optuna.Trial, config: TrialConfig, progress: Progress | None = None) -> Record:
        """The record of a trial that begins, also where an earlier try left a run behind.

        Args:
            progress: of the pruned trial that this one takes up again.
        """
        resumes, about = trial.user_attrs.get(RESUMES), About.of_trial(trial)
        values = config.adapter | config.training
        tags = {
            "workbench.label": config.label,
            "workbench.method": config.method,
            "workbench.role": about.role,
            "workbench.init_seed": str(about.init),
            "workbench.order_seed": str(about.order),
            "workbench.config": about.config,
            "workbench.searched": " ".join(config.varied),
            PARAMS: json.dumps(trial.params),
            **({} if config.size is None else {SIZE: str(config.size)}),
            **({} if about.of is None else {"workbench.finalist_of": str(about.of)}),
            **({} if resumes is None else {"workbench.resumes": str(resumes)}),
        }
        params = {f"{config.label}.{key}": readable(value) for key, value in values.items()}
        run = self.parent.open_trial(trial.number, params, tags)
        study = self.study
        self.tracking.log_dataset(run, study.name, study.data.path or study.data.train or "", self.data_fingerprint)
        trial.set_user_attr("run_id", run.run_id)
        return Record(self, trial, config, run, progress or Progress())

    def go_on(self, trial: optuna.Trial, config: TrialConfig, progress: Progress) -> Record:
        """The record of a trial that was cut off after that much progress."""
        run = self.parent.reopen_trial(trial.user_attrs["run_id"])
        record = Record(self, trial, config, run, progress)
        record.counted = True
        return record


class Record:
    """One trial in the stores, from its beginning to its outcome.

    Attributes:
        counted: whether the numbers of parameters are noted.
        exceeds: whether the trial breaks a constraint.
    """

    def __init__(self, books: Books, trial: optuna.Trial, config: TrialConfig, run: TrialRun, progress: Progress):
        self.books, self.trial, self.config, self.run, self.progress = books, trial, config, run, progress
        stored = books.optuna_study.get_trials(deepcopy=False)[trial.number]
        self._reported = set(stored.intermediate_values)  # before a crash
        self._constrained = set(stored.constraints)
        self.counted = self.exceeds = False
        self._shared = 1
        self._saved: dict[str, Any] = {}

    def parameters(self, trainable: int, total: int) -> None:
        """Note the numbers of parameters."""
        share = 100 * trainable / total
        self.run.log(0, {"trainable_params": trainable, "all_params": total, "trainable_percent": share})
        self.progress.sizes["trainable_params"] = trainable
        self.counted = True

    def predicted(self, verdict: Verdict, planner: Planner) -> None:
        """Note what the trial is predicted to need, for Optuna as constraints."""
        if verdict.unknown:
            self.run.tag("workbench.unpredicted", verdict.unknown)
        if verdict.need is None:
            return
        need = verdict.need
        self.run.log(0, {"trainable_params": need.trainable})
        if planner.peaks:
            peaks = {"load": need.weights, "train": need.train, "eval": need.evaluation}
            parts = ("weights", "adapter", "gradients", "moments", "activations")
            self.run.log(0, {f"predicted_peak_mib/{phase}": peak / MIB for phase, peak in peaks.items()})
            self.run.log(0, {f"predicted_mib/{part}": getattr(need, part) / MIB for part in parts})
            self.progress.sizes["memory"] = need.peak / MIB
        for name, excess in planner.violations(need).items():
            self.constrain(name, excess)

    def constrain(self, name: str, excess: float) -> None:
        """Tell Optuna by how much of a limit the trial is above it; it is feasible below 0."""
        self.exceeds = self.exceeds or excess > 0
        if name not in self._constrained:  # the trial may have been cut off before
            self.trial.set_constraint(name, excess)
            self._constrained.add(name)

    @property
    def seconds_left(self) -> float | None:
        """How long the trial may still take; None: as long as it does."""
        limit = self.books.study.constraints.seconds
        return None if limit is None else limit - self.progress.seconds

    @property
    def too_slow(self) -> str:
        """Why a trial that took this long breaks a constraint; "" if it does not."""
        limit, seconds = self.books.study.constraints.seconds, self.progress.seconds
        return f"it took {seconds:.1f} of {limit:g} seconds" if limit is not None and seconds > limit else ""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note an evaluation, in MLflow before Optuna: what Optuna knows has been recorded."""
        self.progress.step, self.progress.metrics = step, dict(metrics)
        self.run.log(step, {f"validation.{name}": value for name, value in metrics.items()})
        self.run.flush()
        if step not in self._reported and not self.books.study.objective.several:  # Optuna then takes no reports
            self.trial.report(self.books.study.to_compare(self.progress.metrics), step)

    def stint(self, report: Report, losses: Mapping[int, float], results: Path | None) -> None:
        """Note what came of a stretch of training.

        Args:
            losses: the training loss by step.
            results: the folder of what it came to, if the trial is at its last step.
        """
        if report.total and not self.counted:
            self.parameters(report.trainable, report.total)
        if report.shared > self._shared:
            self._shared = report.shared
            self.run.tag("workbench.shared", str(report.shared))
        for step, loss in sorted(losses.items()):
            self.run.log(step, {"train.loss": loss})
        self.progress.add(report.costs)
        self.progress.tokens += report.tokens
        if report.error is None:
            if results:
                self.keep(results, report.adapter_bytes)
            self.evaluated(report.step, report.metrics)
            self._save()
        else:
            self.progress.step = max(report.step, self.progress.step)

    def keep(self, results: Path, size: int) -> None:
        """Keep predictions and the trained adapter as artifacts; `PeftModel.from_pretrained` of peft loads it."""
        self.run.log(0, {"adapter_bytes": size, "tokens_seen": self.progress.tokens})
        self.progress.sizes["adapter_bytes"] = size
        self.run.artifacts(results)

    def end(self, outcome: Outcome, message: str = "", trace: str = "") -> None:
        """Close both with the trial's outcome."""
        costs = self.progress.costs
        self.run.log(0, costs | prediction_errors(costs) | {"seconds/total": self.progress.seconds})
        if self.books.study.constraints.seconds is not None and costs:
            excess = self.progress.seconds / self.books.study.constraints.seconds - 1
            self.constrain("seconds", max(excess, 1e-3) if outcome == "timed_out" else excess)
        self.run.end(outcome, message, trace)
        self._save()
        self.trial.set_user_attr(OUTCOME, outcome)
        tell = self.books.optuna_study.tell
        if outcome == "complete":
            tell(self.trial, self.values)
        else:  # Optuna's samplers learn from constraints of pruned trials, not of failed ones
            given_up = outcome == "pruned" or self.exceeds
            tell(self.trial, state=TrialState.PRUNED if given_up else TrialState.FAIL)

    def _save(self) -> None:
        if (progress := asdict(self.progress)) != self._saved:  # each write to Optuna takes milliseconds
            self.trial.set_user_attr(PROGRESS, progress)
            self._saved = progress

    @property
    def values(self) -> list[float]:
        """What the study is for: the metric, then the costs that are to be low."""
        progress, objective = self.progress, self.books.study.objective
        costs = {"memory": measured_peak(progress.costs), "seconds": progress.seconds} | progress.sizes
        return [progress.metrics[objective.metric], *(costs[name] for name in objective.also)]

    @property
    def objective(self) -> float | None:
        """The study's metric at the last evaluation."""
        return self.progress.metrics.get(self.books.study.objective.metric)


def measured_peak(costs: Mapping[str, float]) -> float:
    """MiB at the highest peak, of whatever was measured."""
    kinds = (*EXACT, "process_peak_growth_mib", "mps_sampled_allocated_mib")
    return next((max(found) for kind in kinds if (found := [costs[k] for k in costs if k.startswith(kind)])), 0.0)


def prediction_errors(costs: Mapping[str, float]) -> dict[str, float]:
    """How far a pass was predicted beyond the exact peak that was measured, in percent, by phase."""
    found = {}
    for phase in ("train", "eval"):
        measured = next((costs[key] for kind in EXACT if (key := f"{kind}/{phase}") in costs), None)
        predicted = costs.get(f"predicted_pass_mib/{phase}")
        if measured and predicted:
            found[f"prediction_error_percent/{phase}"] = 100 * (predicted / measured - 1)
    return found


def outcome(error: Exception) -> Outcome:
    """What becomes of a trial that ended with this error."""
    match error:
        case Diverged():
            return "diverged"
        case OutOfMemory():
            return "out_of_memory"
        case TimedOut():
            return "timed_out"
        case AdapterError() | DataError() if not isinstance(error, CheckpointError):
            return "infeasible"
    return "crashed"


def readable(value: Any) -> Any:
    """A hyperparameter as a param of MLflow: as it is, but for lists and tokens, which are spelt out."""
    return brief(value) if isinstance(value, Tokens | list) else value

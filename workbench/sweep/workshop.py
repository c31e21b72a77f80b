"""What the trials of a study share, and how one of them is trained with it."""

from __future__ import annotations

import errno
import shutil
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from workbench.adapters import PeftConfig
from workbench.errors import AdapterError, DataError, StorageError, TrialError, TrialFailed, WorkbenchError
from workbench.training.adapted import ADAPTER
from workbench.training.base import Base, load_base
from workbench.training.bench import Bench, OnStep, Report, Stint
from workbench.training.config import TrainingSection
from workbench.training.data import RawData, TaskData, read_data, tokenize
from workbench.training.halved import Difference, halve
from workbench.training.memory import add_up, out_of_memory, says_no_memory
from workbench.training.tokens import resolve

from .configure import peft_config
from .domains import Tokens
from .space import TrialConfig
from .spec import Study


@dataclass(frozen=True)
class Seeds:
    """Where a trial's random numbers come from.

    Attributes:
        init: of the adapter's first values and of dropout.
        order: of the order of the data.
    """

    init: int
    order: int


@dataclass(frozen=True)
class Job:
    """A trial's next stretch of training, in words that a worker makes a `Stint` of.

    Attributes:
        trial: its number.
        seeds: what it draws its first values and its batches from.
        config: its hyperparameters.
        begin: the checkpoint that it goes on from; None for a trial that begins.
        end: the file for its next checkpoint. The one it goes on from stays as it is.
        until: the last step of the stretch.
        results: a folder for the adapter and the predictions, at the trial's last step.
        seconds: how long the stretch may take; None: as long as it does.
    """

    trial: int
    seeds: Seeds
    config: TrialConfig
    begin: Path | None
    end: Path
    until: int
    results: Path | None
    seconds: float | None = None


@dataclass
class Workshop:
    """What the trials of a study share: the base model, and the data, tokenised once for each vocabulary.

    Attributes:
        cache: a folder for tokenised data and activations.
        tokenised: data by new tokens.
        resolved: ids by what the study says.
        shared_costs: seconds of work that belongs to no trial.
        difference: what half precision changed in the base's answers, where the study asks for it.
    """

    study: Study
    base: Base
    raw: RawData
    cache: Path
    tokenised: dict[tuple[str, ...], TaskData] = field(default_factory=dict)
    resolved: dict[Tokens, list[int]] = field(default_factory=dict)
    shared_costs: dict[str, float] = field(default_factory=dict)
    difference: Difference | None = None

    @classmethod
    def open(cls, study: Study, home: Path) -> Workshop:
        """Read the data and load the base.

        Raises:
            DataError, ModelError: they are missing or wrong.
        """
        raw = read_data(study.data, study.model.task)
        base = load_base(study.model, raw.labels or None, study.training.seed, study.training.device)
        if study.model.weights == "random":
            base = replace(base, fresh=())  # an artifact of the study holds all of its weights
        shop = cls(study, base, raw, home / "cache")
        shop.data(())  # tokenised once, here, with the loading and not with the first trial
        if study.training.precision == "bf16":
            shop.halve()
        return shop

    def halve(self) -> None:
        """Turn the base's weights into bfloat16."""
        self.base, self.difference = halve(self.base, self.data(()).validation)

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        dropout = "on" if self.study.training.base_dropout else "off (evaluation mode)"
        notes = [*self.data(()).notes, f"the base model is frozen; its own dropout is {dropout}"]
        if self.bench.fault and not self.study.training.base_dropout:
            notes.append(f"batches are padded, since this model cannot be run packed: {self.bench.fault}")
        if self.difference:
            notes.append(
                f"its weights are in bfloat16: logits differ by up to {self.difference.logits:.1%} of the largest, "
                f"{self.difference.agreement:.1%} of the answers are the same (on rows of validation)"
            )
        return notes

    def data(self, new_tokens: tuple[str, ...], base: Base | None = None) -> TaskData:
        """The tokenised data, for the base's own vocabulary or one with new tokens."""
        if new_tokens not in self.tokenised:
            self.tokenised[new_tokens] = tokenize(self.raw, (base or self.base).tokenizer, self.cache)
        return self.tokenised[new_tokens]

    @contextmanager
    def lend(self, new_tokens: tuple[str, ...]) -> Iterator[tuple[Base, TaskData]]:
        """The base and the data with a vocabulary of its own."""
        with self.base.vocabulary(new_tokens) as base:
            yield base, self.data(new_tokens, base)

    def peft_config(self, config: TrialConfig, base: Base, data: TaskData) -> PeftConfig:
        """The configuration of a trial's adapter.

        Raises:
            DataError: the tokens to train are not in the vocabulary, or too few.
            ConfigError: the method refuses the combination of values.
        """
        fields = {
            key: self._resolve(value, base, data) if isinstance(value, Tokens) else value
            for key, value in config.adapter.items()
        }
        return peft_config(config.method, base.task, fields, self.study.training.steps, base.model)

    def _resolve(self, tokens: Tokens, base: Base, data: TaskData) -> list[int]:
        if tokens not in self.resolved:
            self.resolved[tokens] = resolve(tokens, base.tokenizer, data.train)
        return list(self.resolved[tokens])

    def settings(self, config: TrialConfig) -> TrainingSection:
        """How a trial trains."""
        return self.study.training.model_copy(update=config.training)

    def seeds(self, number: int, repeats: int = 0) -> Seeds:
        """The seeds of a trial.

        Args:
            repeats: how many trials had the same configuration before.
        """
        seed, shared = self.study.training.seed, self.study.training.data_order == "shared"
        return Seeds(seed + repeats, seed + repeats if shared else seed + 1 + number)

    # ---------------------------------------------------------------- stints

    @cached_property
    def bench(self) -> Bench:
        """The bench of all trials that add nothing to the vocabulary."""
        return self._bench(self.base, self.data(()))

    def _bench(self, base: Base, data: TaskData) -> Bench:
        return Bench(base, data, self.cache, self.study.training.cache_gib)

    def passes(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """The jobs in groups that train in one pass each. Trials with new tokens train alone: the model grows."""
        alone = [[job] for job in jobs if job.config.new_tokens]
        together: list[Job] = []
        stints = []
        for job in jobs:
            if job.config.new_tokens:
                continue
            try:
                stints.append(self.stint(job, self.base, self.data(())))
                together.append(job)
            except Exception:
                alone.append([job])  # fails in its turn, with a message
        known = {job.trial: job for job in together}
        return alone + [[known[stint.trial] for stint in stints] for stints in self.bench.suggest(stints)]

    def stint(self, job: Job, base: Base, data: TaskData) -> Stint:
        """A job as the bench knows it."""
        settings = self.settings(job.config)
        return Stint(
            trial=job.trial,
            config=self.peft_config(job.config, base, data),
            settings=settings,
            seed=job.seeds.init,
            order_seed=job.seeds.order,
            checkpoint=job.end,
            until=job.until,
            results=job.results,
            seconds=job.seconds,
        )

    def train(self, jobs: Sequence[Job], on_step: OnStep) -> list[Report]:
        """Train the jobs of one pass. Whatever becomes of a trial is in its report; only Ctrl-C comes out."""
        new_tokens = jobs[0].config.new_tokens
        try:
            with self.lend(new_tokens) as (base, data):
                bench = self._bench(base, data) if new_tokens else self.bench
                for job in jobs:
                    prepare(job)
                reports = bench.train([self.stint(job, base, data) for job in jobs], on_step)
                add_up(self.shared_costs, bench.shared_costs)
                bench.shared_costs.clear()
                for job in jobs:
                    if job.results and new_tokens:
                        base.tokenizer.save_pretrained(job.results / ADAPTER)
        except Exception as error:  # a bug in a method or in this program ends one trial, not a night's sweep
            if len(jobs) > 1:
                return [report for job in jobs for report in self.train([job], on_step)]
            reports = [Report(jobs[0].trial, error=error, trace=traceback.format_exc())]
        for report in reports:
            report.error = report.error and as_failure(report.error)
        return reports


def prepare(job: Job) -> None:
    """Let the job's checkpoint be what it goes on from."""
    job.end.unlink(missing_ok=True)  # through a link it would be written elsewhere
    if job.begin is not None:
        shutil.copyfile(job.begin, job.end)


def as_failure(error: Exception) -> WorkbenchError:
    """Any exception of a trial as one that says what became of it, and that can be sent to another process. A
    `StorageError` is not the trial's own: no other could be trained either."""
    if isinstance(error, AdapterError | DataError | TrialError | StorageError):
        return error
    if says_no_space(error):
        return StorageError(f"The disk is full ({error}). Make room; the same command goes on from here.")
    return out_of_memory(error) if says_no_memory(error) else TrialFailed(f"{type(error).__name__}: {error}")


def says_no_space(error: Exception) -> bool:
    """Whether a file could not be written since the disk is full, or one's share of it."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)

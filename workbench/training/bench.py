"""The bench: one frozen base on which trials train by stints, several of them in one pass.

A trial keeps nothing here between its stints. Its checkpoint holds what it trains, its optimiser's moments and how far
it came, so it can be paused, moved to another process, or taken up again after a crash.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from workbench.adapters.bank import Bank, obstacle
from workbench.errors import Diverged, OutOfMemory, TimedOut, WorkbenchError

from .adapted import save_results
from .base import Base
from .data import IGNORED, TaskData
from .frozen import Activations
from .layout import Group
from .loop import Measured, Row, Scores, backward, check_finite, evaluate, in_order, measure, scores, taken_apart
from .memory import Meter, add_up, out_of_memory, release, says_no_memory
from .optimizer import step as optimizer_step
from .packed import Known, Packed, Scored
from .packing import Packing
from .parts import by_length
from .rows import Rows
from .stint import OnStep, Report, Stint
from .trainee import Trainee

__all__ = ["Bench", "OnStep", "Report", "Stint"]

LOGITS = 2**24  # numbers that the logits of a language model may take at once


class Bench:
    """One frozen base and its data, on which stints are trained.

    Passes are packed where the model can (`Packed`); else they are padded, in parts of about one length.

    Args:
        cache: a folder for activations that all trials share.
        cache_gib: the limit of its size; 0: no activations are kept.
        fault: why passes are padded, "" if they are packed, where that is known; else it is tried out.

    Attributes:
        fault: why the model's passes are padded; "" if they are packed.
        shared_costs: seconds of work that was done for all trials, by name.
        packing: how many trials a pass has; it learns from reports that it is shown.
    """

    def __init__(
        self,
        base: Base,
        data: TaskData,
        cache: Path | None = None,
        cache_gib: float = 0.0,
        fault: str | None = None,
    ):
        self.base, self.data = base, data
        gc.collect()
        gc.freeze()  # what is there now stays, so the collection after each pass need not look at it
        self.shared_costs: dict[str, float] = {}
        self.packing = Packing(base.device)
        self.packed: Packed | None = None
        self.store: Activations | None = None
        self.rows: dict[str, Rows] = {}
        self.fault = "it has an encoder and a decoder"
        if base.task == "SEQ_2_SEQ_LM":
            return
        self.rows = {name: Rows.of(name, getattr(data, name)) for name in ("train", "validation")}
        if base.task == "CAUSAL_LM":  # virtual tokens could predict a row's first; metrics are over the others
            self.rows["validation"].labels[self.rows["validation"].starts[:-1]] = IGNORED
        packed = Packed(base)
        tried = (packed.fault(extremes(rows)) for rows in self.rows.values())
        self.fault = next(filter(None, tried), "") if fault is None else fault
        if not self.fault:
            self.packed = packed
            if cache and cache_gib:
                folder = cache / "activations" / f"{base.fingerprint}-{data.fingerprint}"
                self.store = Activations(packed, folder, int(cache_gib * 2**30))

    # ---------------------------------------------------------------- stints

    def suggest(self, stints: Sequence[Stint]) -> list[list[Stint]]:
        """Stints in passes of as many as pays."""
        return self.packing.passes(stints)

    def train(self, stints: Sequence[Stint], on_step: OnStep) -> list[Report]:
        """Train the stints in one pass and measure each on the validation split.

        A trial that cannot share a pass (`obstacle`) has one for itself. One that fails (it diverges, does not fit the
        model or into memory) leaves; the others go on. Ctrl-C passes through and leaves every checkpoint as it was.
        """
        most = self.packing.most
        reports = self._train(stints, on_step)
        release(self.base.device)  # with the frame above the trials are gone
        if len(stints) == 1:
            return reports
        for place, stint in enumerate(stints):
            if isinstance(reports[place].error, OutOfMemory):  # perhaps for what the others held
                (reports[place],) = self.train([stint], on_step)
                if isinstance(reports[place].error, OutOfMemory):
                    self.packing.most = most  # one that is too large alone says nothing of how many others fit
        return reports

    def _train(self, stints: Sequence[Stint], on_step: OnStep) -> list[Report]:
        reports: dict[int, Report] = {stint.trial: Report(stint.trial) for stint in stints}
        trainees: list[Trainee] = []
        device = self.base.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                for stint in stints:
                    with self._blamed(reports[stint.trial]):
                        trainee = Trainee(self.base, self.data, stint, self.packed, self.rows)
                        reports[stint.trial] = trainee.report
                        trainees.append(trainee)
                self.prepare(trainees)
                for together in sharing(trainees):
                    meter = self._meter(together)
                    with meter.phase("train"):
                        self._in_halves(lambda own: self._advance(own, on_step), together)
                    share(meter, together, [trainee.work for trainee in together])
                    if sound := [trainee for trainee in together if trainee.report.error is None]:
                        self._in_halves(self._evaluate, sound)
                for trainee in trainees:
                    with self._blamed(trainee.report):
                        self._write(trainee)
            finally:
                for trainee in trainees:
                    trainee.remove()
        return [reports[stint.trial] for stint in stints]

    @contextmanager
    def _blamed(self, report: Report) -> Iterator[None]:
        """Note why a trial cannot go on."""
        try:
            yield
        except WorkbenchError as error:
            report.error = error
        except Exception as error:  # a bug in a method or in this program ends one trial, not a night's sweep
            if says_no_memory(error):
                report.error = out_of_memory(error)
            else:
                report.error, report.trace = error, traceback.format_exc()

    def _in_halves(self, work: Callable[[Sequence[Trainee]], None], trainees: Sequence[Trainee]) -> None:
        """Do something with trials that share a pass; where memory runs out, with one half of them after the other."""
        try:
            return work(trainees)
        except Exception as error:
            if len(trainees) == 1:
                with self._blamed(trainees[0].report):
                    raise
                return None
            if not says_no_memory(error):
                raise
        # out of the except block the error is gone, and with it the frames that hold the pass
        release(self.base.device)
        half = len(trainees) // 2
        self.packing.most = min(self.packing.most, half)
        self._in_halves(work, trainees[:half])
        self._in_halves(work, trainees[half:])

    def _write(self, trainee: Trainee) -> None:
        """Write a trial's files, if it can go on."""
        stint, report = trainee.stint, trainee.report
        if report.error is not None:
            return
        with trainee.attached():  # where it trains biases of the base, only then they are its own
            trainee.save()
            if stint.results is not None and trainee.measured is not None:
                split = self.data.validation
                report.adapter_bytes = save_results(trainee.model, self.base, split, trainee.measured, stint.results)

    def prepare(self, trainees: Sequence[Trainee]) -> None:
        """Have the activations at hand with which rows enter late; without room for them they enter at the bottom."""
        started = time.perf_counter()
        for trainee in (t for t in trainees if t.packed):
            for name, entry in trainee.entry.items():
                rows = trainee.rows_to_come() if name == "train" else torch.arange(len(entry))
                for layer in set(entry[rows].tolist()) - {0}:
                    own = rows[entry[rows] == layer]
                    if self.store is None or not self.store.prepare(self.rows[name], layer, own):
                        entry[entry == layer] = 0
        if self.store is not None:
            add_up(self.shared_costs, {"seconds/activations": time.perf_counter() - started})

    def _meter(self, trainees: Sequence[Trainee]) -> Meter:
        """What measures a pass."""
        tracked = trainees[0].stint.settings.track_memory
        return Meter(self.base.device, (lambda: self.tensors(trainees)) if tracked else None)

    def tensors(self, trainees: Sequence[Trainee]) -> Iterator[Tensor]:
        """What is there as long as these trials share a pass: the base's tensors and theirs."""
        yield from self.base.model.parameters()
        yield from self.base.model.buffers()
        for trainee in trainees:
            yield from trainee.tensors()

    # ---------------------------------------------------------------- steps

    def _advance(self, trainees: Sequence[Trainee], on_step: OnStep) -> None:
        """Train until all are done."""
        while live := [trainee for trainee in trainees if not trainee.done]:
            with self.on_base(live):
                while not any(trainee.done for trainee in live):
                    self.step(live, on_step)

    @contextmanager
    def on_base(self, trainees: Sequence[Trainee], training: bool = True) -> Iterator[None]:
        """Put the trials' adapters on the base, with what their passes need."""
        with ExitStack() as after:
            packed = self.packed if all(trainee.packed for trainee in trainees) else None
            banked = len(trainees) > 1 or (packed is not None and trainees[0].encoder is not None)
            if banked:
                bank = after.enter_context(Bank({str(i): t.model for i, t in enumerate(trainees)}))
                if packed is not None:
                    packed.bank = bank
                    after.callback(setattr, packed, "bank", None)
            else:
                after.enter_context(trainees[0].attached())
            for place, trainee in enumerate(trainees):
                trainee.place = place
                trainee.mode(training)
                after.callback(trainee.mode, False)
            if packed is not None:
                settings = trainees[0].stint.settings
                packed.checkpointing, packed.compiled = settings.gradient_checkpointing, settings.compile
                after.callback(packed.forget)
                after.enter_context(packed.ready())
            yield

    def step(self, live: Sequence[Trainee], on_step: OnStep) -> None:
        """One optimiser step of each trial."""
        started = time.perf_counter()
        batches = [trainee.batch() for trainee in live]
        for trainee in live:
            trainee.zero_grad()
        if live[0].draws:  # and is alone; this takes as long as a layer
            torch.manual_seed(hash((live[0].stint.seed, live[0].step)) & (2**63 - 1))
        losses = self._packed_losses(live, batches) if live[0].packed else [self._padded_loss(live[0], batches[0])]
        norms = optimizer_step([trainee.optimizer for trainee in live])
        for trainee, loss, norm in zip(live, losses, norms, strict=True):
            try:
                check_finite(trainee.step + 1, trainee.stint.settings, {"loss": loss, "gradient": norm})
            except Diverged as error:
                trainee.report.error = error
                continue
            trainee.stepped()
            trainee.model.base_model.after_step(trainee.step)
            on_step(trainee.stint.trial, trainee.step, loss)
            trainee.seconds += (time.perf_counter() - started) / len(live)
            check_time(trainee)

    def _packed_losses(self, live: Sequence[Trainee], batches: Sequence[Tensor]) -> list[float]:
        """Forward and backward of one batch of each trial; its mean losses."""
        assert self.packed is not None
        rows, totals = self.rows["train"], [0.0] * len(live)
        parts = [
            batch.split(t.stint.settings.micro_batch_size or len(batch)) for t, batch in zip(live, batches, strict=True)
        ]
        counts = [self._scored(trainee, batch) for trainee, batch in zip(live, batches, strict=True)]
        starts = [
            trainee.count(rows, batch).split(len(own[0]))
            for trainee, batch, own in zip(live, batches, parts, strict=True)
        ]
        nothing = torch.zeros(0, dtype=torch.long)  # a pass has a group for each trial of the bank
        for number, there in enumerate(zip_longest(*map(zip, parts, starts), fillvalue=(nothing, nothing))):
            groups = [trainee.group(rows, *part) for trainee, part in zip(live, there, strict=True)]
            loss: Any = 0.0
            for k, own in enumerate(self._losses(groups)):
                totals[k] += float(own.detach()) / counts[k]
                loss = loss + own / counts[k]
            if number == 0:
                for k, trainee in enumerate(live):
                    extra = trainee.model.base_model.penalty() + trainee.model.base_model.regularisation()
                    totals[k] += float(torch.as_tensor(extra).detach())
                    loss = loss + extra
            if loss.requires_grad:  # of rows without a token that trains nothing may
                loss.backward()
        return totals

    def _scored(self, trainee: Trainee, batch: Tensor) -> int:
        """How many positions of these rows are scored."""
        rows = self.rows["train"]
        if self.base.task == "SEQ_CLS":
            return len(batch)
        labels = rows.labels[rows.tokens(batch)]
        if self.base.task == "CAUSAL_LM" and trainee.encoder is None:  # nothing before the first token predicts it
            labels = labels.index_fill(0, rows.lengths[batch].cumsum(0) - rows.lengths[batch], IGNORED)
        return int((labels != IGNORED).sum())

    @property
    def _known(self) -> Known | None:
        return self.store.known if self.store else None

    def _losses(self, groups: Sequence[Group]) -> list[Tensor]:
        """The summed loss of each group, in nats."""
        assert self.packed is not None
        hidden = self.packed.hidden(groups, self._known)
        if self.packed.pooled:
            return [
                F.cross_entropy(logits.float(), group.rows.labels[group.indices].to(logits.device), reduction="sum")
                for logits, group in zip(hidden.split(self.packed.layout.rows), groups, strict=True)
            ]
        losses = []
        for scored in self.packed.scored(hidden):
            pieces = self._pieces(scored)
            if self.packed.by_head and len(pieces) > 1:  # one piece's logits at a time, in the backward pass again
                summed = [checkpoint(self._loss_of, piece, use_reentrant=False) for piece in pieces]
            else:
                summed = [self._loss_of(piece) for piece in pieces]
            losses.append(torch.stack(summed).sum())
        return losses

    def _pieces(self, scored: Scored) -> list[Scored]:
        """Scored positions in pieces whose logits do not take much memory."""
        return scored.split(max(1, LOGITS // self.base.model.config.get_text_config().vocab_size))

    def _loss_of(self, scored: Scored) -> Tensor:
        assert self.packed is not None
        return F.cross_entropy(self.packed.head(scored).float(), scored.labels, reduction="sum")

    def _padded_loss(self, trainee: Trainee, batch: Tensor) -> float:
        """Forward and backward of one batch through the model as it is, in parts of about one length."""
        settings, split = trainee.stint.settings, self.data.train
        lengths = [len(row) for row in split.features[batch.tolist()]["input_ids"]]
        parts = [batch[part].tolist() for part in by_length(lengths, settings.micro_batch_size, self.base.kind)]
        loss, tokens = backward(trainee.model, self.base, split, parts, settings.gradient_checkpointing)
        trainee.work += tokens
        trainee.report.tokens += tokens
        return loss

    # ---------------------------------------------------------------- evaluation

    def _evaluate(self, trainees: Sequence[Trainee]) -> None:
        """Measure trials that share a pass on the validation split."""
        meter = self._meter(trainees)
        with meter.phase("eval"), torch.no_grad():
            found = self._measured(trainees)
        share(meter, trainees, [trainee.work_of(self.rows.get("validation")) for trainee in trainees])
        for trainee, measured in zip(trainees, found, strict=True):
            with self._blamed(trainee.report):
                check_finite(trainee.step, trainee.stint.settings, {"validation loss": measured.metrics["loss"]})
                trainee.measured, trainee.report.metrics = measured, measured.metrics

    def _measured(self, trainees: Sequence[Trainee]) -> list[Measured]:
        """What each trial does on the validation split."""
        split, size = self.data.validation, trainees[0].stint.settings.eval_batch_size
        with self.on_base(trainees, training=False):
            if not trainees[0].packed:
                return [evaluate(trainees[0].model, self.base, split, trainees[0].stint.settings)]
            found = self._score(trainees, self.rows["validation"], size)
        measured = []
        for trainee, rows in zip(trainees, found, strict=True):
            with trainee.attached() if "target" in split.features.column_names else nullcontext():
                measured.append(measure(trainee.model, self.base, split, rows, size))
        return measured

    def _score(self, trainees: Sequence[Trainee], rows: Rows, batch_size: int) -> list[list[Row]]:
        """The scored positions of all rows, in the order of the split, for each trial."""
        assert self.packed is not None
        order = list(rows.lengths.argsort(stable=True).split(batch_size))
        found: list[list[Row]] = [[] for _ in trainees]
        for indices in order:
            for own, (parts, counts) in zip(found, self.scores(trainees, rows, indices), strict=True):
                own += taken_apart(parts, counts)
        return [in_order([indices.tolist() for indices in order], own) for own in found]

    def scores(self, trainees: Sequence[Trainee], rows: Rows, indices: Tensor) -> list[tuple[list[Scores], list[int]]]:
        """For each trial what is kept of the scored positions of some rows, and how many each row has."""
        assert self.packed is not None
        groups = [trainee.group(rows, indices) for trainee in trainees]
        hidden = self.packed.hidden(groups, self._known)
        if self.packed.pooled:
            labels = rows.labels[indices].to(hidden.device)
            each = hidden.split(self.packed.layout.rows)
            return [([scores(logits, labels)], [1] * len(indices)) for logits in each]
        found = []
        for group, scored in zip(groups, self.packed.scored(hidden), strict=True):
            targets = group.targets(self.base.task == "CAUSAL_LM") != IGNORED
            counts = [int(part.sum()) for part in targets.split(group.lengths.tolist())]
            found.append(([scores(self.packed.head(piece), piece.labels) for piece in self._pieces(scored)], counts))
        return found


def extremes(rows: Rows) -> Group:
    """The shortest and the longest rows: what a model cannot do, say windows of attention, shows in these."""
    order = rows.lengths.argsort()
    few = torch.cat([order[:4], order[4:][-4:]])
    return Group(rows, few, torch.zeros_like(few))


def sharing(trainees: Sequence[Trainee]) -> list[list[Trainee]]:
    """Trials that can share a pass, and each of the others alone."""
    able = [t for t in trainees if t.packed and not t.draws and obstacle(t.model) is None]
    return [*([able] if able else []), *([trainee] for trainee in trainees if trainee not in able)]


def check_time(trainee: Trainee) -> None:
    """Let a trial end whose time is up."""
    limit = trainee.stint.seconds
    if limit is not None and trainee.seconds > limit and not trainee.done:
        trainee.report.error = TimedOut(f"step {trainee.step}: the {limit:.3g} seconds that it had are over")


def share(meter: Meter, trainees: Sequence[Trainee], work: Sequence[float]) -> None:
    """Divide the time of a shared phase by the work of each trial, tokens times layers. Peaks are those of the pass."""
    everything = sum(work) or 1.0
    for trainee, own in zip(trainees, work, strict=True):
        trainee.report.shared = len(trainees)
        trainee.report.costs |= {
            name: value * own / everything if name.startswith("seconds/") else value
            for name, value in meter.metrics.items()
        }

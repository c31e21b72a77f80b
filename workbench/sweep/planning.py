"""What the trials of a study will need, before any of them trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workbench.errors import AdapterError, DataError, WorkbenchError
from workbench.training.bench import Bench, Report
from workbench.training.memory import MIB
from workbench.training.rehearsal import Need, blank_base, blank_bench, rehearse

from .domains import Domain
from .match import matched, sized
from .preflight import ends
from .space import TrialConfig
from .spec import MethodSpec
from .workshop import Job, Workshop

GIB = 2**30
CORNERS = 16  # of a method's space that are looked at, at most
SCALES = ("lora_alpha", "alpha")  # fields that scale what an adapter adds, and change nothing about memory
PATIENCE = 30  # infeasible trials in a row until a search gives up
STRAIGHT = 1e-4  # relative distance from a line

Point = tuple[tuple[str, Any], ...]  # the fields of a configuration that may change what it needs


@dataclass(frozen=True)
class Verdict:
    """What a configuration needs and whether it can run.

    Attributes:
        need: None if it cannot be put on the model, or if nobody knows.
        refusal: why it cannot run; "" if it can.
        unknown: why its need could not be found; "" if it was.
    """

    config: TrialConfig
    need: Need | None
    refusal: str = ""
    unknown: str = ""


class Planner:
    """Predicts what trials need.

    Each kind of trial is rehearsed once. Of kinds that differ in one number only (a rank, say), three that lie on a
    line make known all between them: a peak is the highest of several sums of sizes, and if these grow linearly it is
    convex, so that where it touches the line between two points once, it is that line.

    Args:
        shop: of a base without data.
        fault: why passes are padded; "" if they are packed.
        limit: bytes that a pass may take on its device; None: any number.
        peaks: whether anybody asks for peaks of memory; else steps are not rehearsed.
    """

    def __init__(self, shop: Workshop, fault: str, limit: int | None, peaks: bool = True):
        self.shop, self.fault, self.limit, self.peaks = shop, fault, limit, peaks
        self._bench: Bench | None = None
        self._refused: dict[str, Verdict] = {}
        self._in_vain = 0
        self._known: dict[tuple[str, Point], Need] = {}
        self._lines: dict[tuple[str, Point, str], dict[int, Need]] = {}
        self._sizes: dict[tuple[str, Point], int | None] = {}

    @classmethod
    def beside(cls, shop: Workshop, fault: str | None = None, peaks: bool = True) -> Planner:
        """The planner of a study that is about to run.

        Args:
            fault: why passes are padded, where they are though its bench would not.
            peaks: see above.
        """
        study, real = shop.study, shop.base
        labels = shop.raw.labels or None
        blank = blank_base(study.model, labels, real.device, study.training.precision)
        blank = replace(blank, tokenizer=real.tokenizer, fresh=real.fresh)
        own = replace(shop, base=blank)  # shares what was tokenised
        return cls(own, shop.bench.fault if fault is None else fault, study.memory_limit, peaks)

    # ---------------------------------------------------------------- one trial

    def judge(self, config: TrialConfig) -> Verdict:
        """What a configuration needs, or why it cannot run. It has the size that the study asks for."""
        key = f"{config.method} {config.adapter}"
        if key not in self._refused:
            try:
                config = self.matched(config)
                need = self.need(config)
                return Verdict(config, need, self.excess(need))
            except (AdapterError, DataError) as error:
                self._refused[key] = Verdict(config, None, str(error))
            except Exception as error:  # an operation that PyTorch cannot do without data, say
                reason = next(iter(str(error).splitlines()), "")
                self._refused[key] = Verdict(config, None, unknown=f"{type(error).__name__}: {reason}")
        return replace(self._refused[key], config=config)

    def matched(self, config: TrialConfig) -> TrialConfig:
        """The configuration with as many parameters as the study asks for, if it does.

        Raises:
            AdapterError, DataError: it cannot be put on the model, or no size comes close.
        """
        match = self.shop.study.match
        if match is None or config.size is not None:
            return config
        point = (config.method, relevant(config))
        if point not in self._sizes:
            self._sizes[point] = matched(config, match, lambda own: self._rehearse(own, {}).trainable).size
        size = self._sizes[point]
        return config if size is None else sized(config, size)

    def heed(self, verdict: Verdict) -> None:
        """Count how many trials in a row cannot run; they use up neither steps nor minutes."""
        self._in_vain = self._in_vain + 1 if verdict.refusal else 0

    @property
    def hopeless(self) -> WorkbenchError | None:
        """What to say when nothing fits; None as long as there is hope."""
        if self._in_vain < PATIENCE:
            return None
        return WorkbenchError(
            f"{PATIENCE} trials in a row cannot run. `workbench plan {self.shop.study.path}` shows what the search "
            "space needs: raise constraints.vram_gib, lower batch_size, or leave out what does not fit."
        )

    def violations(self, need: Need) -> dict[str, float]:
        """For each limit on what is known beforehand, the share of it by which a trial is above it."""
        limits = self.shop.study.constraints
        every = {
            "vram_gib": (need.peak, self.limit),
            "trainable_params": (need.trainable, limits.trainable_params),
            "adapter_bytes": (need.files, limits.adapter_bytes),
        }
        return {name: value / limit - 1 for name, (value, limit) in every.items() if limit is not None}

    def excess(self, need: Need) -> str:
        """Why a trial that needs this much does not fit; "" if it does."""
        limits, worst = self.shop.study.constraints, self.violations(need)
        if worst.get("trainable_params", 0) > 0:
            return f"it trains {need.trainable:,} parameters of at most {limits.trainable_params:,}; lower its size"
        if worst.get("adapter_bytes", 0) > 0:
            return f"its adapter has {need.files:,} bytes of at most {limits.adapter_bytes:,}; lower its size"
        if self.limit is None or need.peak <= self.limit:
            return ""
        phase, most = ("a training step", need.train) if need.train == need.peak else ("evaluation", need.evaluation)
        hint = "lower eval_batch_size" if need.train < need.peak else "try micro_batch_size or gradient_checkpointing"
        return f"{phase} is predicted to need {most / GIB:.3g} GiB of {self.limit / GIB:.3g}; {hint}"

    def need(self, config: TrialConfig) -> Need:
        """What a trial needs that is alone in its pass.

        Raises:
            AdapterError, DataError: it cannot be put on the model.
        """
        point = relevant(config)
        if (config.method, point) not in self._known:
            between = next(filter(None, (self._between(config.method, *own) for own in split(point))), None)
            need = self._known[config.method, point] = self._rehearse(config, between)
            for rest, name, number in split(point):
                self._lines.setdefault((config.method, rest, name), {})[number] = need
        return self._known[config.method, point]

    def _between(self, method: str, rest: Point, name: str, number: int) -> dict[str, int] | None:
        """What a trial needs that lies on a line between others."""
        line = self._lines.get((method, rest, name), {})
        if len(line) < 3 or not min(line) < number < max(line):
            return None
        found = {}
        for what in ("adapter", "train", "evaluation"):
            sizes = {x: getattr(need, what) for x, need in line.items()}
            low, high = sizes[min(line)], sizes[max(line)]
            slope = (high - low) / (max(line) - min(line))
            if any(abs(low + slope * (x - min(line)) - size) > STRAIGHT * size for x, size in sizes.items()):
                return None
            found[what] = round(low + slope * (number - min(line)))
        return found

    def _rehearse(self, config: TrialConfig, known: dict[str, int] | None) -> Need:
        job = Job(
            0, self.shop.seeds(0), config, None, self.shop.cache / "nothing", self.shop.study.training.steps, None
        )
        with self.shop.lend(config.new_tokens) as (base, data):
            if config.new_tokens:
                bench = blank_bench(base, data, self.fault)
            else:
                bench = self._bench = self._bench or blank_bench(base, data, self.fault)
            need = rehearse(bench, [self.shop.stint(job, base, data)], steps=known is None and self.peaks)
        return need if known is None else replace(need, **known)

    # ---------------------------------------------------------------- several

    def together(self, needs: Sequence[Need]) -> dict[str, int]:
        """Bytes at the peaks of a pass that trials share, by phase: the base is there once."""
        weights = needs[0].weights
        return {
            "train": weights + sum(need.train - weights for need in needs),
            "eval": weights + sum(need.evaluation - weights for need in needs),
        }

    def note(self, reports: Sequence[Report], configs: Sequence[TrialConfig]) -> None:
        """Put what was predicted of a pass beside what was measured of it."""
        needs = [self.judge(config).need for config in configs]
        for report, own in zip(reports, needs, strict=True):
            sharing = needs if report.shared == len(reports) else [own] if report.shared == 1 else [None]
            if all(need is not None for need in sharing) and report.error is None:
                peaks = self.together([need for need in sharing if need is not None])
                report.costs |= {f"predicted_pass_mib/{phase}": peak / MIB for phase, peak in peaks.items()}

    def fitting(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """The jobs of one pass, in as many passes as memory asks for. What is not known is taken to fit."""
        passes: list[list[Job]] = [[]]
        needs: list[Need] = []
        for job in jobs:
            need = self.judge(job.config).need
            more = needs + ([need] if need else [])
            if passes[-1] and more and self.limit is not None and max(self.together(more).values()) > self.limit:
                passes.append([])
                more = [need] if need else []
            passes[-1].append(job)
            needs = more
        return passes


def relevant(config: TrialConfig) -> Point:
    """What may change how much a trial needs: of a fraction only whether it is zero, and no scale."""
    fields = {key: value for key, value in config.adapter.items() if key not in SCALES}
    plain = {key: bool(value) if isinstance(value, float) else hashable(value) for key, value in fields.items()}
    return tuple(sorted(plain.items()))


def hashable(value: Any) -> Any:
    """A value that can be a part of a key."""
    return value if value.__hash__ else repr(value)


def split(point: Point) -> Iterator[tuple[Point, str, int]]:
    """Each whole number of a configuration apart from the rest."""
    for name, value in point:
        if isinstance(value, int) and not isinstance(value, bool):
            yield tuple(field for field in point if field[0] != name), name, value


# ---------------------------------------------------------------- the corners of a search space


def corners(spec: MethodSpec) -> list[TrialConfig]:
    """The ends of a method's search space: all their combinations where these are few, else one field at a time.

    Fields that change nothing about memory stay at their first value.
    """
    values = {key: distinct(key, domain) for key, domain in spec.adapter.items()}
    combinations = list(itertools.islice(itertools.product(*values.values()), CORNERS + 1))
    if len(combinations) > CORNERS:
        first, last = ([found[end] for found in values.values()] for end in (0, -1))
        single = [
            [value if key == field else first[i] for i, key in enumerate(values)]
            for field, found in values.items()
            for value in found[1:]
        ]
        combinations = [tuple(own) for own in (first, *single[: CORNERS - 2], last)]
    training: dict[str, Any] = {key: ends(domain)[0] for key, domain in spec.training.items()}
    varied = tuple(key for key, found in values.items() if len(found) > 1)
    return [
        TrialConfig(spec.label, spec.method, dict(zip(values, chosen, strict=True)), training, varied)
        for chosen in combinations
    ]


def distinct(key: str, domain: Domain) -> list[Any]:
    """The ends of a domain that need not need the same."""
    found = ends(domain)
    if key in SCALES:
        return found[:1]
    if all(isinstance(value, float) for value in found):
        return list({bool(value): value for value in found}.values())
    return found


def survey(planner: Planner, spec: MethodSpec, on_verdict: Callable[[], None]) -> list[Verdict]:
    """The verdicts on a method's corners; the outer ones and the middle first, so that those between may follow."""
    configs = corners(spec)
    order = list(dict.fromkeys([0, len(configs) - 1, len(configs) // 2, *range(len(configs))]))
    found: dict[int, Verdict] = {}
    for i in order:
        found[i] = planner.judge(configs[i])
        on_verdict()
    return [found[i] for i in range(len(configs))]

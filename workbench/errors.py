"""Every error that workbench raises on purpose.

WorkbenchError
├── StudyError               a study file has problems; lists all of them, each with file:line:column
├── StorageError             the Optuna or MLflow store cannot be used as asked
│   └── StorageAway          it does not answer, and may come back
├── StudyFails               all trials of a study fail, so it was stopped
├── DataError                a data set cannot be found, read or does not hold the named columns
├── ModelError               a base model or its tokenizer cannot be loaded
├── ParityError              a version that was loaded again predicts otherwise than its trial
├── AdapterError             the adapter core refuses (also a ValueError, as users of peft expect)
│   ├── ConfigError          a configuration field has a value that the method refuses
│   │   └── ConfigTypeError  the value is of another type than the field (also a TypeError)
│   ├── TargetError          no module of the base model matches, or it is of a kind the method cannot adapt
│   │   ├── LayerKindError   layers are of a kind that a function is not for (also a TypeError)
│   │   └── NoMatchingPeftModuleError  no module of the base model matches
│   ├── AdapterNameError     an adapter name is unknown, taken or malformed
│   ├── MergeError           merging is impossible or would write non-finite weights (also a NotImplementedError)
│   └── CheckpointError      an adapter file is missing, damaged, unsafe or made for another base
│       ├── MismatchError    its tensors have other places or shapes (also a RuntimeError, as torch raises)
│       └── NotAnAdapterError  a file is no adapter configuration (also a TypeError)
└── TrialError               one trial could not finish; the sweep goes on
    ├── Diverged             the loss became NaN or infinite
    ├── OutOfMemory          the trial did not fit
    ├── TimedOut             it took longer than the study lets a trial take
    └── TrialFailed          something that nobody foresaw: a bug, or a worker process that died

A message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass


class WorkbenchError(Exception):
    """Base of all errors a user can cause or mend; the command line prints it without a traceback, exit code 2."""


@dataclass(frozen=True)
class Problem:
    """One fault of a study file. `line` and `column` count from 1, as editors do; `hint` says what to do."""

    file: str
    line: int
    column: int
    message: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.file}:{self.line}:{self.column}: {self.message}{hint}"


class StudyError(WorkbenchError):
    """A study file is invalid. `problems` holds every fault found, in the order of the file."""

    def __init__(self, problems: list[Problem]):
        self.problems = sorted(problems, key=lambda p: (p.line, p.column))
        super().__init__("\n".join(map(str, self.problems)))


class StorageError(WorkbenchError):
    """A store cannot be opened, or holds another study under the same name."""


class StorageAway(StorageError):
    """A store does not answer: it is not there, or is just being started."""


class StudyFails(WorkbenchError):
    """All trials of a study fail, one after the other."""


class DataError(WorkbenchError):
    """A data set is missing, unreadable or lacks what the study names."""


class ModelError(WorkbenchError):
    """A base model or tokenizer cannot be loaded."""


class ParityError(WorkbenchError):
    """What was saved does not predict what was measured."""


class AdapterError(WorkbenchError, ValueError):
    """The adapter core refuses a request."""


class ConfigError(AdapterError):
    """A configuration value that the method refuses. `field` names it, where one field is to blame."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class ConfigTypeError(ConfigError, TypeError):
    """A configuration value of another type than the field is of."""


class TargetError(ConfigError):
    """Nothing in the base model matches, or what matches cannot be adapted."""


class LayerKindError(TargetError, TypeError):
    """Layers, or what is on them, are of a kind that a function is not made for."""


class NoMatchingPeftModuleError(TargetError):
    """No module of the base model is what a configuration names."""


class AdapterNameError(AdapterError):
    """An adapter name is unknown, already taken or malformed."""


class MergeError(AdapterError, NotImplementedError):
    """Adapters cannot be merged as asked."""


class CheckpointError(AdapterError):
    """An adapter file is missing, damaged, unsafe or belongs to another base model."""


class NotAnAdapterError(CheckpointError, TypeError):
    """A file is no adapter configuration."""


class MismatchError(CheckpointError, RuntimeError):
    """Tensors of an adapter file have no place in the model, or another shape than the parameters they are for."""


class TrialError(WorkbenchError):
    """One trial could not finish."""


class Diverged(TrialError):
    """The loss of a trial is no longer a finite number."""


class OutOfMemory(TrialError):
    """A trial needs more memory than there is."""


class TimedOut(TrialError):
    """A trial takes longer than the study lets it."""


class TrialFailed(TrialError):
    """Something that nobody foresaw ended a trial."""


class PeftWarning(UserWarning):
    """Of a configuration that the adapter core takes, though a part of it will not do what one may expect."""

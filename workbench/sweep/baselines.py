"""What adapters are compared with: full fine-tuning, the task's head alone, and the base as it is.

To a study they are methods like the others. On the shared base each is an adapter on no layer, in whose file copies of
whole modules train in place of their originals (`modules_to_save`), so the base stays as it is and peft loads the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from workbench.adapters import METHODS, LoraConfig, PeftConfig
from workbench.adapters.inject import NO_TARGETS
from workbench.adapters.matching import Site, sites, suffixes
from workbench.adapters.model import HEAD_MODULES
from workbench.adapters.precision import HALF
from workbench.adapters.registry import Method
from workbench.adapters.tying import tied_group
from workbench.errors import ConfigError
from workbench.training.config import PER_METHOD


@dataclass(frozen=True)
class Baseline:
    """What the rest of the program needs to know of a baseline.

    Attributes:
        name: the name in a study file.
        title: the name in prose and tables.
        trains: what trains, in words.
        modules: the modules of a base that train as a whole, for a task.
        settings: the training settings that a study may set or search.
        config: the configuration class whose fields a study may set; this one has none of its own.
        size: the field that sets how many parameters train: there is none.
    """

    name: str
    title: str
    trains: str
    modules: Callable[[nn.Module, str | None], Sequence[Site]]
    settings: tuple[str, ...] = PER_METHOD
    config: type[PeftConfig] = PeftConfig
    size: str | None = None

    def configure(self, task: str | None, model: nn.Module) -> LoraConfig:
        """The configuration of the adapter that trains this much of a base.

        Raises:
            ConfigError: the base has nothing of the kind, or it cannot train as it should.
        """
        chosen = self.modules(model, task)
        check_precision(self, chosen)
        paths, tied = {site.path for site in chosen}, {site.path for site in tied_group(model)}
        return LoraConfig(
            task_type=task if chosen else None,  # the head of a known task would train along
            target_modules=NO_TARGETS,
            modules_to_save=names(chosen, model),
            ensure_weight_tying=bool(tied) and tied <= paths,
        )


def head(model: nn.Module, task: str | None) -> list[Site]:
    """What trains beside every adapter of this task, its new head; of a language model, which has none, the output
    layer. Where that shares the embedding's weight it gets one of its own: all below it stays as it is.

    Raises:
        ConfigError: the model has neither.
    """
    found = [site for site in sites(model) if is_head(site, task) or site.module is output_layer(model, task)]
    if not found:
        wanted = " or ".join(HEAD_MODULES.get(task or "", ("an output layer",)))
        raise ConfigError(f"{type(model).__name__} has no head to train alone: nothing in it is called {wanted}.")
    return found


def is_head(site: Site, task: str | None) -> bool:
    """Whether a module is the new head of this task, as `PeftModel` finds it."""
    return site.path.endswith(HEAD_MODULES.get(task or "", ()))


def output_layer(model: Any, task: str | None) -> nn.Module | None:
    """What turns the last layer's numbers into words."""
    return None if task in HEAD_MODULES else model.get_output_embeddings()


def everything(model: nn.Module, task: str | None) -> list[Site]:
    """Modules that hold every parameter, each as small as it can be: most are single layers. The task's head is one, as
    beside every adapter.

    Raises:
        ConfigError: copies of some could not train as the originals would.
    """
    found: list[Site] = []
    for site in sites(model):  # a module comes before those in it
        inside = bool(found) and site.path.startswith(f"{found[-1].path}.")
        if not inside and (is_head(site, task) or site.module._parameters):
            found.append(site)
    held = Counter(id(p) for site in found for p in site.module.parameters())
    own = [name for name, p in model.named_parameters() if id(p) not in held]
    if own:
        raise ConfigError(f"{own[0]} lies in no module of {type(model).__name__} that could train as a whole.")
    tied = {site.path for site in tied_group(model)}
    for site in found:
        if site.path not in tied and any(held[id(p)] > 1 for p in site.module.parameters()):
            raise ConfigError(f"{site.path} shares weights with other modules; copies of them would part ways.")
    return found


def check_precision(baseline: Baseline, chosen: Sequence[Site]) -> None:
    """Refuse weights that would train in half precision, where what a small step adds is rounded away."""
    for site in chosen:
        for p in site.module.parameters():
            if p.dtype in HALF:
                raise ConfigError(
                    f"{baseline.name} would train {site.path} in {p.dtype}, which loses small steps; use model.dtype "
                    "float32 and training.precision fp32, or leave it out."
                )


def names(chosen: Sequence[Site], model: nn.Module) -> list[str]:
    """A few names for `modules_to_save`, each of which means all modules whose paths end with it.

    Raises:
        ConfigError: the path of one ends with the whole path of another one that is not to train.
    """
    paths = {site.path for site in chosen}
    others = {site.path for site in sites(model)} - paths
    found: list[str] = []
    for path in sorted(paths, key=suffixes):
        if not path.endswith(tuple(found)):
            name = next((end for end in suffixes(path) if not any(other.endswith(end) for other in others)), None)
            if name is None:
                raise ConfigError(f"No name means {path} and not another module of {type(model).__name__} as well.")
            found.append(name)
    return sorted(found)


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("full", "full fine-tuning", "every parameter", everything),
        Baseline("head", "the head alone", "the task's head, or the output layer", head),
        Baseline("zero_shot", "zero-shot", "nothing", lambda model, task: (), settings=()),
    )
}
CHOICES: dict[str, Method | Baseline] = {**METHODS, **BASELINES}  # what an entry of a study's `methods` can be


def learns(method: str) -> bool:
    """Whether there is anything to train in a trial of a method or baseline."""
    return method not in BASELINES or bool(BASELINES[method].settings)

"""Layers that share the input embedding's weight: what is put on one of them is on all, or they part ways."""

from __future__ import annotations

import warnings
from typing import Any, cast

from torch import nn

from workbench.errors import ConfigError, TargetError

from . import base_ops
from .adapter import Adapter
from .matching import Site, input_embedding, sites, unique
from .methods.modules_to_save import ModulesToSave
from .methods.trainable_tokens import TiedTokens, TrainableTokens
from .registry import by_peft_type

UNTYING = """```python
from transformers import AutoModelForCausalLM

# Load original tied model, with an output layer of its own, and give that the embedding's weight
model = AutoModelForCausalLM.from_pretrained(model_id, tie_word_embeddings=False)
model.get_output_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
model.save_pretrained(untied_model_dir)

# Now use the original model but in untied format
model = AutoModelForCausalLM.from_pretrained(untied_model_dir)
```
"""


def declared(model: nn.Module) -> bool:
    """Whether a model's configuration says that layers share the input embedding's weight."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(getattr(c, "tie_word_embeddings", False) for c in (text, config))


def tied_layers(model: nn.Module, embedding: base_ops.Layer) -> list[Site]:
    """The other layers that share the weight of an embedding, in models that declare them tied."""
    if not declared(model):
        return []
    return [
        site
        for site in sites(model)
        if isinstance(site.module, (nn.Linear, nn.Embedding))
        and site.module.weight is embedding.weight
        and site.module is not embedding
    ]


def tied_group(model: nn.Module) -> list[Site]:
    """The input embedding and the layers that share its weight; none where there are no others."""
    try:
        embedding = input_embedding(model)
    except TargetError:
        return []
    tied = unique(tied_layers(model, embedding.module))
    return [embedding, *tied] if tied else []


def tied_names(model: nn.Module) -> list[str]:
    """Paths of the layers that share the input embedding's weight."""
    return sorted(site.path for site in tied_group(model)[1:])


def tie_tokens(model: nn.Module, config: Any, made: list[tuple[Site, Adapter]]) -> list[tuple[Site, Adapter]]:
    """Let the layers that share an embedding's weight use its trained rows, unless they have some of other tokens.

    Raises:
        ConfigError: they have, though `ensure_weight_tying` is set.
    """
    ensure = getattr(config, "ensure_weight_tying", False)
    there = {id(site.module): adapter for site, adapter in made}
    tied: list[tuple[Site, Adapter]] = []
    for site, source in made:
        if not isinstance(source, TrainableTokens) or there[id(site.module)] is not source:
            continue
        others = tied_layers(model, site.module) if isinstance(site.module, nn.Embedding) else []
        if ensure and not tied_group(model):
            warnings.warn(
                f"ensure_weight_tying=True but the model does not have tied weights: the tokens of {site.path} are its "
                "own.",
                stacklevel=2,
            )
        for other in others:
            own = there.get(id(other.module))
            if own is None or (isinstance(own, TrainableTokens) and own.token_indices == source.token_indices):
                tied.append((other, TiedTokens(source, other.module)))
            elif ensure and isinstance(own, TrainableTokens):
                raise ConfigError(
                    "Cannot ensure weight tying when different token indices are specified for tied layers: "
                    f"{site.path} and {other.path} share their weight. Name the same tokens for both, or set "
                    "ensure_weight_tying=False.",
                    "trainable_token_indices",
                )
        there |= {id(other.module): adapter for other, adapter in tied}
    return [pair for pair in made if there[id(pair[0].module)] is pair[1]] + tied


def tie(model: nn.Module, config: Any, made: list[tuple[Site, Adapter]]) -> list[tuple[Site, Adapter]]:
    """Let the layers that share the input embedding's weight share its adapter, or its trained copy, where one of them
    has one and `ensure_weight_tying` asks for it."""
    method, asked = by_peft_type(config.peft_type), getattr(config, "ensure_weight_tying", None)
    group = tied_group(model)
    mine = {id(s.module): (s, a) for s, a in made if any(s.module is member.module for member in group)}
    adapters = [adapter for _, adapter in mine.values()]
    if any(isinstance(adapter, (TrainableTokens, TiedTokens)) for adapter in adapters):
        return made
    if not asked:
        if mine:
            reason = (
                "no implementation exists to tie the adapters"
                if asked is None
                else "`ensure_weight_tying` is not set to True"
            )
            paths = ", ".join(site.path for site, _ in mine.values())
            warnings.warn(f"{paths} shares its weight with other layers, but {reason}: they part ways.", stacklevel=2)
        return made
    if not mine:
        where = "added in either `modules_to_save` or `target_modules`" if group else "were found in the model"
        kind = "no tied modules are" if group else "no tied modules"
        warnings.warn(f"You have requested `ensure_weight_tying`, but {kind} {where}.", stacklevel=2)
        return made
    first, *others = group
    source: Any = mine[id(first.module)][1] if id(first.module) in mine else None
    tied: list[tuple[Site, Adapter]] = []
    if any(isinstance(adapter, ModulesToSave) for adapter in adapters):
        source = source or ModulesToSave(first.module)
        for site in others:
            copied = ModulesToSave(site.module)
            copied.modules_to_save.weight = source.modules_to_save.weight
            tied.append((site, copied))
    else:
        source = source or cast(Any, method.adapter)(first.module, config, first.path)
        tied = [(site, cast(Any, method.tied)(source, site.module)) for site in others]
    return [*(pair for pair in made if id(pair[0].module) not in mine), (first, source), *tied]


def holds_tied_embeddings(model: nn.Module, name: str) -> bool:
    """Whether an adapter has trained copies of several embeddings that share a weight, as encoder and decoder do."""
    wrapped = [site.wrapper for site in tied_group(model)[1:] if isinstance(site.module, nn.Embedding)]
    return any(isinstance(layer.named_adapters().get(name), ModulesToSave) for layer in wrapped if layer)


def warn_of_merging(model: Any, config: Any, paths: list[str]) -> None:
    """Warn if an adapter on these modules, which is about to be merged, changes a weight that others share, or will
    share with them where the merged model is loaded."""
    if not declared(model) or getattr(config, "ensure_weight_tying", False):
        return
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    ends = {id(output), id(getattr(output, "base_layer", None)), *(id(site.module) for site in tied_group(model))}
    changed = [site.path for site in sites(model) if site.path in paths and id(site.module) in ends]
    if changed:
        warnings.warn(
            f"The model's configuration says that the weight of {', '.join(changed)} is tied to that of other layers: "
            "they will answer with the merged adapter as well. To prevent that, untie the weights before you make the "
            f"adapter:\n{UNTYING}",
            stacklevel=4,
        )

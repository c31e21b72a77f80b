"""The model card, README.md: what a hub shows of an adapter, and by which it is found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .config import TaskType, __version__

if TYPE_CHECKING:
    from .model import PeftModel

VERSIONS = "### Framework versions"


def write_card(model: PeftModel, folder: str | Path) -> None:
    """Write a folder's README.md from the hub's template, or add to the one that is there: what wrote the adapter, its
    base model and tags. The card's text is left as it is but for the version."""
    path = Path(folder, "README.md")
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    base, config = model.get_base_model(), model.active_peft_config
    name = base.__dict__.get("name_or_path")
    tags = {*(card.data.tags or ()), *(getattr(base, "model_tags", None) or ())}
    if isinstance(base, PreTrainedModel):
        tags.add("transformers")
    if config.peft_type == "LORA":
        tags.add("lora")
    if name:
        tags.add(f"base_model:adapter:{name}")
        card.data.base_model = name
    card.data.library_name = "peft"
    card.data.tags = sorted(tags)
    if config.task_type == TaskType.CAUSAL_LM and not card.data.pipeline_tag:
        card.data.pipeline_tag = "text-generation"
    version, lines = f"- PEFT {__version__}", card.text.splitlines()
    if version not in lines:
        if VERSIONS not in lines:
            lines += [VERSIONS, ""]
        lines.insert(lines.index(VERSIONS) + 2, version)
    card.text = "\n".join(lines)
    card.save(path)

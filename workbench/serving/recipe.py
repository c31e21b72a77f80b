"""What a registered version says of itself, so that its adapter finds the same base and reads the same columns."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from workbench.errors import CheckpointError
from workbench.training.config import DataSection, ModelSection, Section
from workbench.training.data import COLUMNS, OPTIONAL_COLUMNS

FILE, ADAPTER, TOKENIZER = "recipe.json", "adapter", "tokenizer"  # what a version holds
INPUTS = ("text", "text_pair", "tokens")


class BaseRecipe(Section):
    """How to load the base model. Versions whose base recipes are equal share one.

    Attributes:
        model: as in the study; `path` is a hub id or the folder where it lay, `revision` the commit of a hub id.
        labels: class or tag names in the order of the head's outputs; none for language models.
        seed: of the weights that the model's files lack.
        precision: fp32, or bf16 for weights in half precision.
        new_tokens: what was added to the tokenizer's vocabulary.
        fingerprint: hash of the weights in the model's files.
        whole: hash of all of the base as the study computed with it, what was drawn from the seed included.
    """

    model: ModelSection
    labels: tuple[str, ...] = ()
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    new_tokens: tuple[str, ...] = ()
    fingerprint: str = ""
    whole: str = ""


class Recipe(Section):
    """All that it takes to predict, beside the adapter and the tokenizer.

    Attributes:
        base: the base model.
        data: names of the columns, and the lengths at which texts are cut.
        batch_size: rows at once.
    """

    base: BaseRecipe
    data: DataSection
    batch_size: int = 64

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the input: what the task calls them, and their names in files."""
        task = self.base.model.task
        names = {field: getattr(self.data, field) for field in COLUMNS[task] + OPTIONAL_COLUMNS.get(task, ())}
        return {field: name for field, name in names.items() if field in INPUTS and name is not None}

    def save(self, folder: Path) -> None:
        """Write `recipe.json`."""
        (folder / FILE).write_text(self.model_dump_json(indent=2, exclude_defaults=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Recipe:
        """Read `recipe.json`.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{folder / FILE} is missing or damaged, so this is no version that `workbench register` wrote: "
                f"{str(error).splitlines()[0]}"
            ) from error

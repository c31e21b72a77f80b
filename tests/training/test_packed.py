"""Packed passes of many architectures against padded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.adapters import LoraConfig
from workbench.training import bench as bench_file
from workbench.training.layout import Group
from workbench.training.packed import Packed
from workbench.training.rows import Rows

from .places import LAYERS, SPECIAL, Place, made_settings, make_base, make_data, same

pytestmark = pytest.mark.filterwarnings("ignore")

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"hidden_dim": 24},
    "electra": {"embedding_size": 8},
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 32},
    "qwen2": {"num_key_value_heads": 1},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
}
PACKED = [
    *((kind, task, options) for kind, options in ENCODERS.items() for task in ("SEQ_CLS", "TOKEN_CLS")),
    *((kind, task, options) for kind, options in DECODERS.items() for task in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM")),
    ("gpt2", "TOKEN_CLS", {"n_inner": 24}),
    ("gpt2", "CAUSAL_LM", {"n_inner": 24}),
]
PADDED = [
    ("gpt2", "SEQ_CLS", {"n_inner": 24}),  # puts all tokens into the shape of the input again
    ("mistral", "CAUSAL_LM", {"num_key_value_heads": 1, "sliding_window": 4}),  # shorter than the rows
    ("modernbert", "SEQ_CLS", {"classifier_pooling": "mean", "global_attn_every_n_layers": 1}),
    ("albert", "SEQ_CLS", {"embedding_size": 8}),  # one layer, again and again
    ("deberta-v2", "TOKEN_CLS", {"relative_attention": True, "pos_att_type": ["c2p"]}),
    (
        "gpt_neo",
        "CAUSAL_LM",
        {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_hidden_layers": 4, "window_size": 4},
    ),
]


def name(value: Any) -> str | None:
    return value if isinstance(value, str) else ""


class Here:
    """A base with a packed model, and the rows to run."""

    def __init__(self, kind: str, task: str, options: dict[str, Any], **data: Any):
        self.base = make_base(kind, task, **options)
        self.rows = Rows.of("train", make_data(task, **data).train)
        self.packed = Packed(self.base)
        self.kept: dict[int, list[Tensor]] = {}

    def group(self, *indices: int, entry: Any = 0) -> Group:
        where = torch.tensor(indices, dtype=torch.long)
        return Group(self.rows, where, torch.zeros_like(where) + torch.as_tensor(entry))

    def keep(self) -> None:
        """Compute the activations of every row before each layer, and after all."""
        for layer in range(1, self.packed.depth + 1):
            everything = self.group(*range(len(self.rows)))
            flat = self.packed.activations(everything, layer)
            vectors = self.packed.pooled and layer == self.packed.depth
            self.kept[layer] = list(flat.split(1 if vectors else self.rows.lengths.tolist()))

    def known(self, group: Group, layer: int, which: Tensor) -> Tensor:
        return torch.cat([self.kept[layer][i] for i in group.indices[which].tolist()])

    def check(self, *groups: Group) -> None:
        """Assert that a packed pass of these groups gives what a padded pass gives of each."""
        with torch.no_grad():
            for got, group in zip(self.packed.scores(groups, self.known), groups, strict=True):
                torch.testing.assert_close(got, self.packed._padded(group), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("kind", "task", "options"), PACKED, ids=name)
def test_packed_is_padded(kind: str, task: str, options: dict[str, Any]) -> None:
    """Whatever the rows' lengths, their groups, and the layers at which they enter."""
    here = Here(kind, task, options)
    with torch.no_grad():
        assert here.packed.fault(here.group(*range(8))) == ""
        here.keep()
    here.check(here.group(*range(12)))
    here.check(here.group(0), here.group(1, 5), here.group(2, 3, 4))
    draw = torch.Generator().manual_seed(0)
    for lowest in range(LAYERS + 1):
        entry = torch.randint(lowest, LAYERS + 1, (12,), generator=draw)
        groups = [here.group(*indices, entry=entry[list(indices)]) for indices in ((0, 3, 1), (2,), (9, 8, 7, 6))]
        here.check(*groups)
    here.check(here.group(4, 2, entry=LAYERS), here.group(3, entry=LAYERS))


@pytest.mark.parametrize(("kind", "task"), [("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("llama", "SEQ_CLS")])
def test_rows_of_one_token(kind: str, task: str) -> None:
    here = Here(kind, task, {}, shortest=1, longest=3)
    assert int(here.rows.lengths.min()) == 1
    here.keep()
    here.check(here.group(0))
    here.check(here.group(0, 1, 2), here.group(*range(3, 9), entry=1))


def test_token_types() -> None:
    here = Here("bert", "SEQ_CLS", {}, pairs=True)
    here.keep()
    here.check(here.group(*range(6)), here.group(*range(6, 9), entry=2))
    here.rows.types.zero_()  # type: ignore[union-attr]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(here.packed.scores([here.group(5)])[0], here.kept[LAYERS][5])


def test_gradients_are_those_of_padded_passes() -> None:
    """Also of what is above rows that entered late."""
    for kind, task in (("bert", "SEQ_CLS"), ("roberta", "TOKEN_CLS"), ("llama", "CAUSAL_LM")):
        here = Here(kind, task, {})
        with torch.no_grad():
            here.keep()
        last = here.packed.layers[LAYERS - 1].requires_grad_(True)
        entry = torch.tensor([0, LAYERS - 1, 1, LAYERS - 1, 2])
        found = []
        for scores in (
            here.packed.scores([here.group(*range(5), entry=entry)], here.known)[0],
            here.packed._padded(here.group(*range(5))),
        ):
            found.append(torch.autograd.grad(scores.square().sum(), list(last.parameters())))
        largest = max(g.norm() for g in found[1])
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= 1e-5 * largest


@pytest.mark.parametrize(("kind", "task", "options"), PADDED, ids=name)
def test_what_cannot_be_packed_is_padded(
    kind: str, task: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_file, "release", lambda device: None)
    place = Place(make_base(kind, task, **options), make_data(task), tmp_path)
    assert place.bench.fault
    assert place.bench.packed is None
    linear = [n for n, m in place.base.model.named_modules() if isinstance(m, torch.nn.Linear) and "layers.0" in n]
    config = lambda: LoraConfig(task_type=task, target_modules=linear or "all-linear")  # noqa: E731
    settings = made_settings(steps=8)
    same(place.alone(config(), settings), place.plainly(config(), settings), 1e-5)


def test_models_whose_long_rows_are_rare_are_padded_too(tmp_path: Path) -> None:
    """A window that only one row is longer than, in the validation split."""
    data = make_data("CAUSAL_LM", longest=9)
    features = data.validation.features
    long = list(range(SPECIAL, SPECIAL + 14))
    columns = {key: [*features[key][:], long] for key in ("input_ids", "labels")}
    validation = type(data.validation)(type(features).from_dict(columns), "CAUSAL_LM", 0)
    data = type(data)(data.train, validation, [], [], "rare")
    place = Place(make_base("mistral", "CAUSAL_LM", num_key_value_heads=1, sliding_window=11), data, tmp_path)
    assert place.bench.fault


def test_layers_of_parameters() -> None:
    """What comes before all layers counts as the first, what comes after as one more."""
    packed = Here("bert", "SEQ_CLS", {}).packed
    assert packed.layer_of("bert.embeddings.word_embeddings.weight") == 0
    assert packed.layer_of("bert.encoder.layer.2.output.dense.weight") == 2
    assert packed.layer_of("bert.pooler.dense.weight") == packed.layer_of("classifier.bias") == LAYERS
    packed = Here("llama", "CAUSAL_LM", {}).packed
    assert packed.layer_of("model.embed_tokens.weight") == 0
    assert packed.layer_of("model.layers.1.mlp.up_proj.weight") == 1
    assert packed.layer_of("model.norm.weight") == packed.layer_of("lm_head.weight") == LAYERS

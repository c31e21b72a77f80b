"""What is predicted without data against what the same trial takes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.adapters import PeftConfig
from workbench.adapters.registry import METHODS
from workbench.errors import AdapterError
from workbench.training.base import load_base
from workbench.training.bench import Bench
from workbench.training.config import ModelSection
from workbench.training.halved import halve
from workbench.training.memory import MIB
from workbench.training.rehearsal import blank_base, blank_bench, fault_of, rehearse
from workbench.training.stint import Stint

from .places import KINDS, Place, config_of, made_settings, make_base, make_data
from .test_bench import CANNOT, VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore")

Places = Callable[[str], Place]
CLOSE = 0.1  # relative; of a tiny model one tensor is much, and garbage may hold one for a while


@pytest.fixture(scope="session")
def known_blanks() -> dict[str, Bench]:
    return {}


@pytest.fixture
def blanks(known_blanks: dict[str, Bench], places: Places, tmp_path: Path) -> Callable[[str], Bench]:
    """Gives the bench of a place without data, by its kind."""

    def blank(kind: str) -> Bench:
        if kind not in known_blanks:
            place = places(kind)
            base = blank_base(saved(place, tmp_path / "model"), labels_of(place), torch.device("cpu"))
            base.model.name_or_path = place.base.model.name_or_path  # stands in an adapter's file
            known_blanks[kind] = blank_bench(base, place.data, place.bench.fault)
        return known_blanks[kind]

    return blank


def labels_of(place: Place) -> list[str] | None:
    return None if place.base.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else place.base.labels


def saved(place: Place, folder: Path, weights: str = "random") -> ModelSection:
    """The place's model as a study names it."""
    place.base.model.save_pretrained(folder)
    place.base.tokenizer.save_pretrained(folder)
    return ModelSection(path=str(folder), task=place.base.task, weights=weights)  # type: ignore[arg-type]


def measured(place: Place, *stints: Stint, bench: Bench | None = None) -> tuple[dict[str, float], int, int]:
    """The costs of a pass, the numbers that trained and the bytes of the files."""
    reports = place.reports(stints, bench)
    assert [report.error for report in reports] == [None] * len(stints), reports[0].trace
    assert {report.shared for report in reports} == {len(stints)}
    return reports[0].costs, sum(r.trainable for r in reports), sum(r.adapter_bytes for r in reports)


def agree(place: Place, blank: Bench, configs: list[PeftConfig], bench: Bench | None = None, **changes: Any) -> None:
    """Assert that a pass takes what is predicted."""
    settings = made_settings(steps=4, track_memory=True, **changes)
    stints = [place.stint(config, settings, results=place.folder / f"results-{place.count}") for config in configs]
    need = rehearse(blank, stints)
    costs, trainable, files = measured(place, *stints, bench=bench)
    assert need.train == pytest.approx(costs["tensor_peak_mib/train"] * MIB, rel=CLOSE)
    evaluation = costs["tensor_peak_mib/eval"] * MIB
    if "target" not in place.data.validation.features.column_names:
        assert need.evaluation == pytest.approx(evaluation, rel=CLOSE)
    else:  # texts are produced as well
        assert need.weights < need.evaluation <= evaluation * (1 + CLOSE)
    assert (need.trainable, need.files) == (trainable, files)
    assert need.gradients * 2 == need.moments == 8 * need.trainable
    assert min(need.weights, need.adapter, need.activations) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method(kind: str, method: str, places: Places, blanks: Callable[[str], Bench]) -> None:
    place, blank = places(kind), blanks(kind)
    config = config_of(method, place.base)
    if (kind, method) in CANNOT:
        with pytest.raises(AdapterError):
            rehearse(blank, [place.stint(config, made_settings(steps=4))])
        return
    agree(place, blank, [config])


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, places: Places, blanks: Callable[[str], Bench]) -> None:
    agree(places("classifying"), blanks("classifying"), [VARIANTS[variant]()])


@pytest.mark.parametrize("kind", ["classifying", "continuing"])
def test_several_in_one_pass(kind: str, places: Places, blanks: Callable[[str], Bench]) -> None:
    place = places(kind)
    agree(place, blanks(kind), [config_of(method, place.base) for method in ("lora", "lora", "ia3", "prompt_tuning")])


@pytest.mark.parametrize("changes", [{"micro_batch_size": 2}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("kind", ["classifying", "continuing", "translating"])
def test_what_saves_memory(kind: str, changes: Any, places: Places, blanks: Callable[[str], Bench]) -> None:
    place = places(kind)
    agree(place, blanks(kind), [config_of("lora", place.base)], **changes)


@pytest.mark.parametrize("kind", ["classifying", "continuing"])
def test_bf16(kind: str, tmp_path: Path) -> None:
    model, task, config = KINDS[kind]
    place = Place(make_base(model, task, **config), make_data(task), tmp_path)
    section, labels = saved(place, tmp_path / "model"), labels_of(place)
    place.base, _ = halve(place.base, place.data.validation)
    place.bench = place.another_bench()
    blank = blank_base(section, labels, torch.device("cpu"), "bf16")
    blank.model.name_or_path = place.base.model.name_or_path
    agree(place, blank_bench(blank, place.data, ""), [config_of("lora", place.base)], precision="bf16")


def test_the_compiler_is_left_out(places: Places, blanks: Callable[[str], Bench]) -> None:
    place, blank = places("classifying"), blanks("classifying")
    plain, compiled = (
        rehearse(blank, [place.stint(config_of("lora", place.base), made_settings(steps=4, compile=compile))])
        for compile in (False, True)
    )
    assert plain == compiled


def test_padded_passes(places: Places, blanks: Callable[[str], Bench]) -> None:
    place, blank = places("classifying"), blanks("classifying")
    padded = place.another_bench(fault="so that this is tested")
    agree(place, blank_bench(blank.base, place.data, "as well"), [config_of("lora", place.base)], padded)


def test_a_device_that_is_not_here(places: Places, tmp_path: Path) -> None:
    place = places("classifying")
    section = saved(place, tmp_path)
    bases = {kind: blank_base(section, labels_of(place), torch.device(kind), "bf16") for kind in ("cpu", "cuda")}
    assert bases["cuda"].kind == "cuda"
    config = config_of("lora", place.base, target_modules="all-linear")
    stint = place.stint(config, made_settings(steps=4, batch_size=20, precision="bf16"))
    cpu, cuda = (rehearse(blank_bench(base, place.data, ""), [stint]) for base in bases.values())
    assert cpu.train > cuda.train  # a CPU computes attention in float32


@pytest.mark.parametrize("kind", KINDS)
def test_packed_or_padded_is_found_out_on_a_small_copy(kind: str, places: Places, tmp_path: Path) -> None:
    place = places(kind)
    section = saved(place, tmp_path)
    base = blank_base(section, labels_of(place), torch.device("cpu"))
    assert fault_of(section, base, place.data) == place.bench.fault


def test_a_model_that_cannot_run_packed(tmp_path: Path) -> None:
    """Gemma 2 bends attention's logits, which packed attention does not."""
    place = Place(
        make_base("gemma2", "CAUSAL_LM", head_dim=8, num_key_value_heads=2, attn_logit_softcapping=0.5),
        make_data("CAUSAL_LM"),
        tmp_path / "place",
    )
    section = saved(place, tmp_path / "model")
    assert place.bench.fault
    assert fault_of(section, blank_base(section, None, torch.device("cpu")), place.data).startswith("its output")


def test_what_a_models_files_lack(places: Places, tmp_path: Path) -> None:
    """Files of the encoder alone, which a task's head is not in: it is saved with the adapter."""
    place = places("classifying")
    section = saved(place, tmp_path, "pretrained")
    place.base.model.base_model.save_pretrained(tmp_path)
    labels = ["a", "b", "c"]
    blank, base = blank_base(section, labels, torch.device("cpu")), load_base(section, labels, 0, "cpu")
    assert blank.fresh == base.fresh != ()


def test_a_rehearsal_leaves_the_base_as_it_was(places: Places, blanks: Callable[[str], Bench]) -> None:
    """Also where a trial cannot be put on it."""
    place, blank = places("classifying"), blanks("classifying")
    names = [name for name, _ in blank.base.model.named_modules()]
    stint = place.stint(config_of("lora", place.base, r=8), made_settings(steps=4))
    first = rehearse(blank, [stint])
    for bad in (config_of("lora", place.base, target_modules=["nothing"]), config_of("adaption_prompt", place.base)):
        with pytest.raises(AdapterError):
            rehearse(blank, [stint, place.stint(bad, made_settings(steps=4))])
    assert rehearse(blank, [stint]) == first
    assert [name for name, _ in blank.base.model.named_modules()] == names
    assert not any(p.requires_grad for p in blank.base.model.parameters())

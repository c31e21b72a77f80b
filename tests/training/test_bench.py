"""Stints on the bench against the plain loop, alone and several in a pass, with what may happen in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from workbench.adapters import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from workbench.adapters.registry import METHODS
from workbench.errors import AdapterError, CheckpointError, Diverged, OutOfMemory
from workbench.training import bench as bench_file
from workbench.training.trainee import Trainee

from .places import (
    KINDS,
    LAYERS,
    TOKENS,
    Place,
    Trained,
    came_of,
    config_of,
    counted,
    made_settings,
    make_base,
    make_data,
    same,
    weights_in,
)

pytestmark = pytest.mark.filterwarnings("ignore")

Places = Callable[[str], Place]
WEIGHTS = 1e-5  # relative difference of any tensor after 50 steps
TOP = list(range(1, LAYERS))

# ---------------------------------------------------------------- one stint is the plain loop

CANNOT = {
    *((kind, "adaption_prompt") for kind in ("classifying", "tagging", "translating")),  # for decoders only
    *((kind, "multitask_prompt_tuning") for kind in KINDS),  # needs the task of each row, which no data set has
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_trains_as_in_the_plain_loop(kind: str, method: str, places: Places) -> None:
    place = places(kind)
    assert bool(place.bench.fault) == (kind == "translating")
    settings = made_settings(steps={"translating": 10, "answering": 20}.get(kind, 50))
    if (kind, method) in CANNOT:
        with pytest.raises(AdapterError):
            place.plainly(config_of(method, place.base), settings)
        (report,) = place.reports([place.stint(config_of(method, place.base), settings)])
        assert isinstance(report.error, AdapterError)
        return
    expected = place.plainly(config_of(method, place.base), settings)
    same(place.alone(config_of(method, place.base), settings), expected, WEIGHTS)


def lora(**options: Any) -> PeftConfig:
    return LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value"], **options})


def tokens(**options: Any) -> PeftConfig:
    return TrainableTokensConfig(**{"task_type": "SEQ_CLS", "token_indices": TOKENS, **options})


def head_only() -> PeftConfig:
    """Of the trained tokens none occurs, so what trains is the head."""
    return tokens(token_indices=[0], modules_to_save=["classifier"])


VARIANTS: dict[str, Callable[[], PeftConfig]] = {
    "all linear": lambda: lora(target_modules="all-linear"),
    "embeddings": lambda: lora(target_modules=["word_embeddings", "value"]),
    "dora": lambda: lora(use_dora=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "biases": lambda: lora(bias="lora_only"),
    "kasa": lambda: lora(kasa_config={}),
    "velora": lambda: lora(velora_config={"num_groups": 4}),
    "pooler": lambda: lora(modules_to_save=["pooler", "classifier"]),
    "tokens and lora": lambda: lora(trainable_token_indices=TOKENS),
    "tokens and lora above": lambda: lora(trainable_token_indices=TOKENS, layers_to_transform=TOP),
    "positions": lambda: tokens(target_modules=["position_embeddings"], token_indices=[3, 4]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_do_variants(variant: str, places: Places) -> None:
    place, settings = places("classifying"), made_settings(steps=10)
    got = place.alone(VARIANTS[variant](), settings)
    same(got, place.plainly(VARIANTS[variant](), settings), WEIGHTS)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_virtual_tokens_need_positions(method: str, places: Places) -> None:
    """A table of 64 for rows of up to 14."""
    place, settings = places("classifying"), made_settings(steps=2)
    fits, too_many = (config_of(method, place.base, num_virtual_tokens=n) for n in (50, 51))
    (report,) = place.reports([place.stint(fits, settings)])
    assert report.error is None
    (report,) = place.reports([place.stint(too_many, settings)])
    assert isinstance(report.error, AdapterError)
    assert "51 virtual tokens and rows of up to 14 tokens are more than the 64 positions" in str(report.error)
    place = places("continuing")  # turns positions, and has no table
    (report,) = place.reports([place.stint(config_of(method, place.base, num_virtual_tokens=51), settings)])
    assert report.error is None


def test_a_layer_may_train_as_a_whole(tmp_path: Any) -> None:
    """Its copy has attention of its own, which looks at whole rows. The model has no dropout, since the copy's acts."""
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    place = Place(make_base("bert", "SEQ_CLS", **config), make_data("SEQ_CLS"), tmp_path)
    whole = lambda: lora(layers_to_transform=[1], modules_to_save=["layer.2", "classifier"])  # noqa: E731
    settings = made_settings(steps=20)
    expected = place.plainly(whole(), settings)
    got, _ = place.benched(place.stint(whole(), settings), place.stint(lora(), settings))
    for trained in (got, expected):  # which the softmax does not see, so that its gradient is rounding
        del trained.weights["base_model.model.bert.encoder.layer.2.modules_to_save.default.attention.self.key.bias"]
    same(got, expected, WEIGHTS)


@pytest.mark.parametrize("settings", [{"micro_batch_size": 2}, {"gradient_checkpointing": True}, "both"], ids=str)
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("classifying", "lora"),
        ("classifying", "adalora"),
        ("tagging", "trainable_tokens"),
        ("continuing", "prompt_tuning"),
        ("answering", "lora"),
        ("answering", "adaption_prompt"),
        ("translating", "lora"),
    ],
)
def test_parts_and_recomputing_change_nothing(kind: str, method: str, settings: Any, places: Places) -> None:
    place = places(kind)
    changes = {"micro_batch_size": 2, "gradient_checkpointing": True} if settings == "both" else settings
    expected = place.plainly(config_of(method, place.base), made_settings(steps=12))
    same(place.alone(config_of(method, place.base), made_settings(steps=12, **changes)), expected, WEIGHTS)


def test_a_prefix_cannot_be_recomputed(places: Places) -> None:
    place = places("continuing")
    settings = made_settings(gradient_checkpointing=True)
    (report,) = place.reports([place.stint(config_of("prefix_tuning", place.base), settings)])
    assert isinstance(report.error, AdapterError)


def test_tokens_are_counted_as_in_the_plain_loop(places: Places) -> None:
    for kind in ("classifying", "translating"):
        place = places(kind)
        lengths = [len(row) for row in place.data.train.features["input_ids"]]
        stint = place.stint(config_of("ia3", place.base), made_settings(steps=6, batch_size=4))  # 24 rows, each once
        (report,) = place.reports([stint])
        assert report.tokens == sum(lengths)
        assert report.trainable == sum(t.numel() for t in weights_in(stint.checkpoint).values())
        assert report.shared == 1
        assert {"seconds/train", "seconds/eval"} < set(report.costs)


def test_the_adapter_is_written_and_answers_as_measured(places: Places) -> None:
    place, settings = places("classifying"), made_settings(steps=12)
    stint = place.stint(lora(), settings, results=place.folder / "results")
    (report,) = place.reports([stint])
    assert report.adapter_bytes > 0
    model = PeftModel.from_pretrained(place.base.model, place.folder / "results" / "adapter")
    measured = bench_file.evaluate(model, place.base, place.data.validation, settings).metrics
    model.delete_adapter("default")
    assert measured == pytest.approx(report.metrics, rel=1e-5)


# ---------------------------------------------------------------- activations that are kept

UPPER: dict[str, Callable[[], PeftConfig]] = {
    "two layers": lambda: lora(layers_to_transform=TOP),
    "last layer": lambda: lora(layers_to_transform=[LAYERS - 1]),
    "head": head_only,
    "tokens and head": lambda: tokens(modules_to_save=["classifier"]),
}


@pytest.mark.parametrize("upper", UPPER)
def test_kept_activations_change_nothing(
    upper: str, places: Places, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when they are computed, nor with those of an earlier process, nor where there is no room."""
    place, settings = places("classifying"), made_settings(steps=20)  # four epochs
    expected = place.plainly(UPPER[upper](), settings)
    computed = counted(monkeypatch)
    for cache, room, works in ((tmp_path, 1.0, True), (tmp_path, 1.0, False), (tmp_path / "full", 1e-9, False)):
        bench = place.another_bench(cache=cache, cache_gib=room)
        (got,) = place.benched(place.stint(UPPER[upper](), settings), bench=bench)
        same(got, expected, WEIGHTS)
        assert bool(computed) == works
        computed.clear()


@pytest.mark.parametrize("kind", ["tagging", "answering"])
def test_kept_activations_of_all_tokens(kind: str, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    place, settings = places(kind), made_settings(steps=12)
    computed = counted(monkeypatch)
    for options in ({"layers_to_transform": [LAYERS - 1]}, {"target_modules": ["lm_head", "classifier"]}):
        config = lambda: config_of("lora", place.base, **options)  # noqa: B023, E731
        if kind == "tagging" and "target_modules" in options:
            config = lambda: config_of(  # noqa: E731
                "trainable_tokens", place.base, token_indices=[0], modules_to_save=["classifier"]
            )
        same(place.alone(config(), settings), place.plainly(config(), settings), WEIGHTS)
    assert LAYERS - 1 in computed
    assert LAYERS in computed


def test_dropout_of_the_base_is_neither_packed_nor_kept(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    place, computed = places("classifying"), counted(monkeypatch)
    assert place.base.model.config.hidden_dropout_prob == 0.1
    settings = made_settings(steps=5, base_dropout=True)
    config = lambda: lora(layers_to_transform=[LAYERS - 1])  # noqa: E731
    bench = place.another_bench()
    trainee = Trainee(place.base, place.data, place.stint(config(), settings), bench.packed, bench.rows)
    trainee.remove()
    assert trainee.packed is False
    one, again = (place.benched(place.stint(config(), settings), bench=bench)[0] for _ in range(2))
    assert one.differs(again) == 0
    assert computed == []
    assert one.differs(place.alone(config(), made_settings(steps=5))) > 1e-3


# ---------------------------------------------------------------- several in a pass


def adalora(steps: int) -> PeftConfig:
    return AdaLoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "value"],
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=4,
        deltaT=3,
        total_step=steps,
    )


def mix(steps: int) -> list[tuple[PeftConfig, dict[str, Any], dict[str, Any]]]:
    """Trials that differ in all that may: adapter, settings, seeds."""
    head: dict[str, Any] = {"task_type": "SEQ_CLS"}
    return [
        (lora(r=4), {"learning_rate": 2e-3}, {"seed": 1}),
        (lora(r=2, lora_alpha=3, target_modules=["query", "dense"]), {"schedule": "cosine"}, {"order_seed": 1}),
        (lora(r=3, lora_dropout=0.3), {"weight_decay": 0.3}, {"seed": 2}),
        (lora(layers_to_transform=[LAYERS - 1], lora_dropout=0.2), {"schedule": "constant"}, {"order_seed": 2}),
        (IA3Config(**head), {"max_grad_norm": 0.05, "learning_rate": 2e-2}, {}),
        (LoHaConfig(r=2, target_modules=["query", "value"], **head), {"warmup": 0.4}, {"seed": 3, "order_seed": 3}),
        (tokens(), {"learning_rate": 3e-2, "weight_decay": 0.01}, {"seed": 4}),
        (head_only(), {"warmup": 0.0}, {"order_seed": 4}),
        (PromptTuningConfig(num_virtual_tokens=2, **head), {"learning_rate": 2e-2}, {"seed": 5}),
        (PromptTuningConfig(num_virtual_tokens=4, **head), {}, {"seed": 6}),
        (adalora(steps), {"learning_rate": 8e-3}, {"order_seed": 5}),
    ]


def stints(place: Place, steps: int, **changes: Any) -> list[Any]:
    return [
        place.stint(config, made_settings(steps=steps, **{**settings, **changes}), **seeds)
        for config, settings, seeds in mix(steps)
    ]


def one_by_one(place: Place, several: list[Any]) -> list[Trained]:
    return [place.benched(stint)[0] for stint in several]


def all_same(got: list[Trained], expected: list[Trained]) -> None:
    for a, b in zip(got, expected, strict=True):
        same(a, b, WEIGHTS)


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch_size": 2, "gradient_checkpointing": True}], ids=["whole", "in parts, recomputed"]
)
def test_a_bank_of_all_is_each_alone(changes: dict[str, Any], places: Places) -> None:
    place, steps = places("classifying"), 12 if changes else 50
    expected = one_by_one(place, stints(place, steps))
    all_same(place.benched(*stints(place, steps, **changes)), expected)


@pytest.mark.parametrize("kind", ["tagging", "continuing", "answering"])
def test_banks_of_other_tasks(kind: str, places: Places) -> None:
    place = places(kind)

    def trials() -> list[Any]:
        methods = ["lora", "adalora", "ia3", "lokr", "trainable_tokens", "prompt_tuning", "p_tuning"]
        configs = [config_of(method, place.base) for method in methods]
        configs += [config_of("lora", place.base, r=2, layers_to_transform=[LAYERS - 1], lora_dropout=0.5)]
        configs += [config_of("prefix_tuning", place.base)]  # cannot share a pass
        if place.base.task == "CAUSAL_LM":
            configs += [config_of("lora", place.base, target_modules=["lm_head"], lora_dropout=0.5)]
        settings = [made_settings(steps=15, learning_rate=1e-3 * (i + 1)) for i in range(len(configs))]
        return [place.stint(c, s, i, i % 2) for i, (c, s) in enumerate(zip(configs, settings, strict=True))]

    all_same(place.benched(*trials()), one_by_one(place, trials()))


def test_logits_in_pieces(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout before the output layer, in parts, and computed again."""
    place = places("continuing")

    def trials(**changes: Any) -> list[Any]:
        configs = [
            config_of("lora", place.base, target_modules=["lm_head", "q_proj"], lora_dropout=p) for p in (0, 0.5)
        ]
        return [place.stint(c, made_settings(steps=6, **changes), i) for i, c in enumerate(configs)]

    expected = place.benched(*trials())
    monkeypatch.setattr(bench_file, "LOGITS", 500)
    all_same(place.benched(*trials()), expected)
    all_same(place.benched(*trials(micro_batch_size=2, gradient_checkpointing=True)), expected)


def test_trials_with_random_numbers_of_their_own(places: Places) -> None:
    """Beside dropout, whose masks each trial draws for itself."""
    place = places("classifying")
    dropped = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query"], "rank_dropout": 0.5}
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5}

    def trials() -> list[Any]:
        configs = [lora(), LoHaConfig(**dropped), LoHaConfig(**dropped), lora(monteclora_config={})]
        configs += [config_of("p_tuning", place.base, **lstm) for _ in range(2)]
        return [place.stint(config, made_settings(steps=5), seed=i) for i, config in enumerate(configs)]

    all_same(place.benched(*trials()), one_by_one(place, trials()))


def test_trials_enter_and_leave(places: Places) -> None:
    """Some begin, some go on, and each leaves after its own step."""
    place = places("classifying")
    steps = 18
    expected = one_by_one(place, stints(place, steps))
    trials = stints(place, steps)
    begin = [place_until(stint, 6) for stint in trials[::2]]
    assert [report.step for report in place.reports(begin)] == [6] * len(begin)
    untils = [6 + i for i in range(len(trials))]
    middle = [place_until(stint, until) for stint, until in zip(trials, untils, strict=True)]
    assert [report.step for report in place.reports(middle)] == untils
    all_same(place.benched(*trials), expected)


def place_until(stint: Any, until: int) -> Any:
    return bench_file.Stint(**{**vars(stint), "until": until})


@pytest.mark.parametrize(
    "method", ["lora", "adalora", "lokr", "trainable_tokens", "prompt_tuning", "p_tuning", "prefix_tuning"]
)
def test_interrupted_is_uninterrupted(method: str, places: Places) -> None:
    """To the bit; the configuration of each stint is a new one."""
    place, settings = places("classifying"), made_settings(steps=20)
    options = {"lora_dropout": 0.3} if method in ("lora", "adalora") else {}
    make = lambda: config_of(method, place.base, **options)  # noqa: E731
    whole = place.stint(make(), settings)
    (expected,) = place.benched(whole)
    interrupted = place.stint(make(), settings)
    for until in (3, 7, 20):
        stint = bench_file.Stint(**{**vars(interrupted), "until": until, "config": make()})
        (got,) = place.benched(stint)
    assert expected.differs(got) == 0
    assert got.metrics == expected.metrics


def test_checkpoints_of_others_and_damaged_ones_are_refused(places: Places) -> None:
    place, settings = places("classifying"), made_settings(steps=2)
    stint = place.stint(lora(), settings)
    place.reports([stint])
    other = place.stint(lora(r=2), settings, checkpoint=stint.checkpoint)
    good = place.stint(lora(), settings)
    for damage, message in ((lambda: None, "another trial"), (lambda: stint.checkpoint.write_bytes(b"0"), "be read")):
        damage()
        bad, sound = place.reports([other, good])
        assert isinstance(bad.error, CheckpointError)
        assert message in str(bad.error)
        assert sound.error is None


# ---------------------------------------------------------------- what goes wrong


def test_a_trial_that_diverges_does_not_touch_its_neighbours(places: Places) -> None:
    place = places("classifying")
    wild = made_settings(steps=20, learning_rate=1e30, warmup=0.5)  # so that it takes some steps
    trials, others = stints(place, 20), stints(place, 20)
    for position in (0, 6, 10):
        trials[position] = place.stint(trials[position].config, wild)
        del others[position - len(trials)]
    expected = place.benched(*others)
    reports = place.reports(trials)
    for position in (0, 6, 10):
        assert isinstance(reports[position].error, Diverged)
        assert 0 < reports[position].step < 20
        assert not trials[position].checkpoint.exists()
    whole = [(s, r) for i, (s, r) in enumerate(zip(trials, reports, strict=True)) if i not in (0, 6, 10)]
    all_same([came_of(*pair) for pair in whole], expected)


def test_divergence_is_that_of_the_plain_loop(places: Places) -> None:
    place = places("classifying")
    settings = made_settings(steps=20, learning_rate=1e30, warmup=0)
    with pytest.raises(Diverged) as expected:
        place.plainly(lora(), settings)
    (report,) = place.reports([place.stint(lora(), settings)])
    assert str(report.error) == str(expected.value)


@pytest.mark.parametrize("count", [1, 3])
def test_ctrl_c_passes_through(count: int, places: Places) -> None:
    place = places("classifying")
    trials = stints(place, 20)[:count]
    place.reports([place_until(stint, 3) for stint in trials])
    before = [stint.checkpoint.read_bytes() for stint in trials]

    def stop(trial: int, step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.bench.train(trials, stop)
    assert [stint.checkpoint.read_bytes() for stint in trials] == before


def test_on_step_hears_of_all_steps(places: Places) -> None:
    place, heard = places("classifying"), []
    trials = [place_until(stint, 3 + i) for i, stint in enumerate(stints(place, 20)[:3])]
    place.bench.train(trials, lambda *step: heard.append(step))
    for i, stint in enumerate(trials):
        own = [(step, loss) for trial, step, loss in heard if trial == stint.trial]
        assert [step for step, _ in own] == list(range(1, 4 + i))
        assert all(math.isfinite(loss) for _, loss in own)


def test_a_bank_too_large_for_memory_is_halved(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    place = places("classifying")
    expected = one_by_one(place, stints(place, 12)[:4])
    steps: list[int] = []
    step = bench_file.optimizer_step

    def greedy(optimizers: Any) -> Any:
        steps.append(len(optimizers))
        if len(optimizers) > 2 and len(steps) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(optimizers)

    monkeypatch.setattr(bench_file, "optimizer_step", greedy)
    all_same(place.benched(*stints(place, 12)[:4]), expected)
    assert steps == [4] * 6 + [2] * 7 * 2


def test_a_trial_too_large_for_memory_leaves_nothing(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    place, settings = places("classifying"), made_settings(steps=12)
    expected = place.alone(lora(), settings)

    def greedy(*_: Any, **__: Any) -> Any:
        return torch.empty(2**60)

    with monkeypatch.context() as patched:
        patched.setattr(bench_file.F, "cross_entropy", greedy)
        stint = place.stint(lora(), settings)
        (report,) = place.reports([stint])
    assert isinstance(report.error, OutOfMemory)
    assert report.metrics == {}
    assert not stint.checkpoint.exists()
    assert place.alone(lora(), settings).differs(expected) == 0


def test_a_trial_that_does_not_fit_the_model_leaves_the_others(places: Places) -> None:
    place, settings = places("classifying"), made_settings(steps=5)
    expected = place.alone(lora(), settings)
    bad, good = place.stint(lora(target_modules=["nothing"]), settings), place.stint(lora(), settings)
    reports = place.reports([bad, good])
    assert isinstance(reports[0].error, AdapterError)
    same(came_of(good, reports[1]), expected, WEIGHTS)

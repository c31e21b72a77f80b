"""Drawing trials: what is drawn, how it is stored, and that a stored trial gives the same settings again."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import FixedTrial

from workbench.adapters.registry import METHODS
from workbench.errors import StorageError
from workbench.sweep.domains import Tokens
from workbench.sweep.samplers import pruner, sampler
from workbench.sweep.space import TrialConfig, combinations, decisions, from_params, in_flight, suggest
from workbench.sweep.spec import Study, load_study

HEAD = """\
study: tiny
model: {path: some/model, task: SEQ_CLS}
data: {path: some/data, text: text, label: label}
training: {steps: 100, eval_every: 20}
"""

ALL = """\
  lora:
    r: {min: 2, max: 64, distribution: log_uniform_values}
    lora_alpha: {min: 8, max: 64, distribution: q_log_uniform_values, q: 8}
    lora_dropout: {min: 0.1, max: 0.45, q: 0.1}
    target_modules: {values: [[query, value], all-linear]}
    init_lora_weights: {values: [true, gaussian]}
    bias: none
    schedule: {values: [linear, constant]}
    learning_rate: {min: 1e-4, max: 1e-2, distribution: log_uniform_values}
  tokens:
    method: lora
    r: 4
    trainable_token_indices: {values: [null, [5, 7], {most_informative: {min: 8, max: 64}}, {new_tokens: [<a>]}]}
  ia3:
    feedforward_modules: {values: [[], [output.dense]]}
    target_modules: [key, value, output.dense]
"""


def study(folder: Path, methods: str = ALL, search: str = "{}", budget: str = "{trials: 3}") -> Study:
    file = folder / "study.yaml"
    file.write_text(f"{HEAD}budget: {budget}\nsearch: {search}\nmethods:\n{methods}")
    return load_study(file)


def one(folder: Path, entry: str) -> Study:
    return study(folder, f"  lora: {{{entry}}}\n")


def run(searched: Study, trials: int, storage: str | None = None) -> list[tuple[optuna.Trial, TrialConfig]]:
    """The trials that an ask-and-tell loop draws, all as good as each other."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    store = optuna.create_study(storage=storage, sampler=sampler(searched), pruner=pruner(searched))
    drawn = []
    for _ in range(trials):
        trial = store.ask()
        drawn.append((trial, suggest(trial, searched)))
        store.tell(trial, 0.0)
    return drawn


def test_parameters_are_named_by_label(tmp_path: Path) -> None:
    params = {"method": "tokens", "tokens.trainable_token_indices": "most_informative"}
    params["tokens.trainable_token_indices.most_informative"] = 32
    config = suggest(FixedTrial(params), study(tmp_path))
    assert config == TrialConfig(
        "tokens",
        "lora",
        {"r": 4, "trainable_token_indices": Tokens(most_informative=32)},
        {},
        ("trainable_token_indices",),
    )


def test_one_label_is_no_parameter(tmp_path: Path) -> None:
    assert suggest(FixedTrial({"lora.r": 4}), one(tmp_path, "r: {values: [4, 8]}")).label == "lora"


def test_values_that_are_not_scalars_are_stored_as_text(tmp_path: Path) -> None:
    (trial, config), *_ = run(one(tmp_path, "target_modules: {values: [[query, value]]}"), 1)
    assert trial.params == {"lora.target_modules": '["query", "value"]'}
    assert config.adapter == {"target_modules": ["query", "value"]}
    assert config.varied == ()


def test_draws_keep_to_the_space(tmp_path: Path) -> None:
    """Every drawn value is one that the file allows, of its type, and all methods and values turn up."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns about whatever it has to adjust
        configs = [config for _, config in run(study(tmp_path, search="{sampler: random}"), 400)]
    lora = [config for config in configs if config.label == "lora"]
    assert {type(c.adapter["r"]) for c in lora} == {int}
    assert min(c.adapter["r"] for c in lora) >= 2
    assert max(c.adapter["r"] for c in lora) <= 64
    assert sum(c.adapter["r"] < 12 for c in lora) > len(lora) / 3  # half of them, on a logarithmic scale
    assert {c.adapter["lora_alpha"] for c in lora} == {8, 16, 24, 32, 40, 48, 56, 64}
    assert {round(c.adapter["lora_dropout"], 9) for c in lora} == {0.1, 0.2, 0.3, 0.4}
    assert {c.adapter["init_lora_weights"] for c in lora} == {True, "gaussian"}
    assert {json.dumps(c.adapter["target_modules"]) for c in lora} == {'["query", "value"]', '"all-linear"'}
    assert {c.training["schedule"] for c in lora} == {"linear", "constant"}
    assert all(1e-4 <= float(c.training["learning_rate"]) <= 1e-2 for c in lora)
    tokens = {c.adapter["trainable_token_indices"] for c in configs if c.label == "tokens"}
    assert {None, Tokens(ids=(5, 7)), Tokens(new_tokens=("<a>",))} <= tokens
    counts = [t.most_informative for t in tokens if t and t.most_informative]
    assert len(counts) > 10
    assert 8 <= min(counts) <= max(counts) <= 64
    for config in configs:  # what is drawn is what the method takes
        plain = {k: [0] if isinstance(v, Tokens) else v for k, v in config.adapter.items()}
        METHODS[config.method].config(**plain)


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_stored_trials_come_back(tmp_path: Path, name: str) -> None:
    """Through a database, where numbers and choices are written out and read."""
    searched = study(tmp_path, search=f"{{sampler: {name}}}")
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    drawn = run(searched, 20, storage)
    stored = optuna.load_study(study_name=None, storage=storage).trials
    assert [from_params(trial.params, searched) for trial in stored] == [config for _, config in drawn]


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    params = {"lora.r": 8}
    assert from_params(params, one(tmp_path, "r: {values: [4, 8]}")).adapter == {"r": 8}
    for entry in ("r: {values: [4, 16]}", "r: {values: [4, 8]}, lora_alpha: {values: [4, 8]}"):
        with pytest.raises(StorageError, match="search space was changed"):
            from_params(params, one(tmp_path, entry))


def test_trials_share_no_lists(tmp_path: Path) -> None:
    """A configuration class may change the list that it is given."""
    searched = one(tmp_path, "modules_to_save: [pooler], target_modules: {values: [[query]]}")
    for _ in range(2):
        config = suggest(FixedTrial({"lora.target_modules": '["query"]'}), searched)
        assert config.adapter == {"modules_to_save": ["pooler"], "target_modules": ["query"]}
        config.adapter["modules_to_save"].append("classifier")
        config.adapter["target_modules"].append("key")


def test_describe(tmp_path: Path) -> None:
    params = {
        "method": "lora",
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0.30000000000000004,
        "lora.target_modules": '["query", "value"]',
        "lora.init_lora_weights": True,
        "lora.schedule": "linear",
        "lora.learning_rate": 0.00123456,
    }
    assert suggest(FixedTrial(params), study(tmp_path)).describe() == {
        "r": "8",
        "lora_alpha": "16",
        "lora_dropout": "0.3",
        "target_modules": "query, value",
        "init_lora_weights": "true",
        "schedule": "linear",
        "learning_rate": "0.00123",
    }
    ia3 = suggest(FixedTrial({"method": "ia3", "ia3.feedforward_modules": "[]"}), study(tmp_path))
    assert ia3.describe() == {"feedforward_modules": "none"}


@pytest.mark.parametrize(
    ("entry", "number"),
    [
        ("", 1),
        ("r: 8, bias: all", 1),
        ("r: {values: [4, 8, 16]}, bias: {values: [none, all]}", 6),
        ("r: {min: 1, max: 9}", 9),
        ("r: {min: 1, max: 9, q: 3}", 3),
        ("r: {min: 1, max: 9, distribution: log_uniform_values}", 9),
        ("lora_dropout: {min: 0, max: 0.3, q: 0.1}", 4),
        ("lora_dropout: {min: 0, max: 0.3}", None),
        ("lora_dropout: {min: 0.3, max: 0.3}", 1),
        ("trainable_token_indices: {values: [null, [1], {most_frequent: {min: 5, max: 9}}]}", 7),
        ("trainable_token_indices: {most_frequent: {values: [5, 9]}}", 2),
    ],
)
def test_combinations(tmp_path: Path, entry: str, number: int | None) -> None:
    assert combinations(one(tmp_path, entry)) == number


def test_combinations_of_methods_add_up(tmp_path: Path) -> None:
    methods = "  lora: {r: {values: [4, 8]}}\n  ia3: {}\n"
    assert combinations(study(tmp_path, methods)) == 3


GRID = """\
  lora: {r: {values: [4, 8]}, lora_alpha: {min: 1, max: 3}}
  tokens: {method: lora, trainable_token_indices: {values: [[1], {most_frequent: {min: 5, max: 6}}]}}
  ia3: {}
"""


def test_grid_draws_every_combination_once(tmp_path: Path) -> None:
    searched = study(tmp_path, GRID, "{sampler: grid}")
    number = combinations(searched)
    assert number == 10
    drawn = run(searched, number + 1)  # one more does not stop the loop
    assert set(Counter(str(config) for _, config in drawn[:number]).values()) == {1}


@pytest.mark.parametrize("name", ["tpe", "random", "grid", "qmc"])
def test_samplers_are_seeded_and_silent(tmp_path: Path, name: str) -> None:
    methods = "  lora: {r: {min: 1, max: 60}, lora_alpha: {min: 1, max: 60}}\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second, other = (
            [config for _, config in run(study(tmp_path, methods, f"{{sampler: {name}, seed: {seed}}}"), 4)]
            for seed in (0, 0, 1)
        )
    assert first == second
    assert first != other


def test_tpe_learns_which_method_is_better(tmp_path: Path) -> None:
    searched = study(tmp_path, "  lora: {r: {min: 1, max: 64}}\n  ia3: {init_ia3_weights: {values: [true, false]}}\n")
    store = optuna.create_study(sampler=sampler(searched), direction="maximize")
    labels = []
    for _ in range(60):
        trial = store.ask()
        config = suggest(trial, searched)
        labels.append(config.label)
        store.tell(trial, 1 + config.adapter["r"] / 64 if config.label == "lora" else 0.0)
    assert labels[:30].count("ia3") > labels[30:].count("ia3")
    assert labels[30:].count("lora") > 20


@pytest.mark.parametrize(("name", "prunes"), [("median", True), ("successive_halving", True), ("none", False)])
def test_pruners_stop_a_trial_that_lags_behind(tmp_path: Path, name: str, prunes: bool) -> None:
    searched = study(tmp_path, search=f"{{pruner: {name}}}")
    store = optuna.create_study(sampler=sampler(searched), pruner=pruner(searched), direction="maximize")
    for quality in range(10, 20):
        trial = store.ask()
        for step in searched.training.eval_steps:
            trial.report(quality, step)
            assert not trial.should_prune()  # each is better than those before
        store.tell(trial, quality)
    trial = store.ask()
    trial.report(0, searched.training.eval_steps[0])
    assert bool(trial.should_prune()) is prunes


def test_hyperband_spans_the_steps_of_a_trial(tmp_path: Path) -> None:
    """Its brackets are made of the steps at which trials report; some of them stop the worst at the first."""
    searched = study(tmp_path, search="{pruner: hyperband}")
    store = optuna.create_study(sampler=sampler(searched), pruner=pruner(searched), direction="maximize")
    pruned = 0
    for number in range(30):
        trial = store.ask()
        for step in searched.training.eval_steps:
            trial.report(-number, step)
            if trial.should_prune():
                pruned += 1
                store.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            store.tell(trial, -number)
    assert 0 < pruned < 30


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("median", [20, 40, 60, 80, 100]),
        ("successive_halving", [20, 60, 100]),
        ("hyperband", [20, 60, 100]),
        ("none", [100]),
    ],
)
def test_decisions_are_made_where_trials_are_measured(tmp_path: Path, name: str, steps: list[int]) -> None:
    searched = study(tmp_path, search=f"{{pruner: {name}}}")
    assert decisions(searched) == steps
    assert {*steps} <= {*searched.training.eval_steps}


@pytest.mark.parametrize(
    ("search", "budget", "number"),
    [
        ("sampler: random, pruner: successive_halving", "trials: 16", 16),
        ("sampler: random, pruner: hyperband", "trials: 40", 27),
        ("sampler: random, pruner: hyperband", "minutes: 5", 9),
        ("sampler: tpe, pruner: successive_halving", "trials: 16", 9),
        ("sampler: random, pruner: none", "steps: 1000", 27),
        ("sampler: random, pruner: none", "minutes: 5", 6),
        ("sampler: tpe, pruner: none", "trials: 16", 6),
        ("sampler: random, pruner: median", "trials: 16", 6),
        ("sampler: random, pruner: median, in_flight: 2", "trials: 16", 2),
    ],
)
def test_how_many_trials_are_live_at_once(tmp_path: Path, search: str, budget: str, number: int) -> None:
    assert in_flight(study(tmp_path, search=f"{{{search}}}", budget=f"{{{budget}}}")) == number

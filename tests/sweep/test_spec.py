"""Every mistake in a study file is found, at once and at its place. In the texts below § marks where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import Problem, StudyError
from workbench.sweep import source
from workbench.sweep.domains import DISTRIBUTIONS, TOKEN_KEYS, Choice, Constant, Range, TokenRange, Tokens
from workbench.sweep.schema import json_schema
from workbench.sweep.spec import Study, StudyFile, load_study
from workbench.training.config import PER_METHOD
from workbench.training.metrics import METRICS

ROOT = Path(__file__).parents[2]

HEAD = """\
study: tiny
model: {path: some/model, task: SEQ_CLS}
data: {path: some/data, text: text, label: label}
training: {steps: 10}
budget: {trials: 3}
"""

QUICKSTART = """\
study: quickstart
model: {path: assets/minilm-l3-8k, task: SEQ_CLS}
data: {path: assets/movie_sentiment, text: text, label: label}
training: {steps: 150, batch_size: 32, eval_every: 50}
methods:
  lora:
    r: {values: [4, 8, 16]}
    lora_alpha: 16
    target_modules: {values: [[query, value], all-linear]}
    learning_rate: {min: 1e-4, max: 1e-2, distribution: log_uniform_values}
  tokens_with_lora:
    method: lora
    r: 4
    trainable_token_indices: {most_informative: {values: [32, 128]}}
  ia3:
    feedforward_modules: {values: [[], [output.dense]]}
    target_modules: [key, value, output.dense]
  trainable_tokens:
    token_indices:
      values: [[5, 7], ["movie", "film"], {new_tokens: ["<a>"]}, {most_frequent: 64}, {most_informative: 64}]
objective: {metric: accuracy, goal: maximize}
budget: {trials: 12, steps: 3000, minutes: 10}
search: {sampler: tpe, pruner: median, seed: 0}
"""


def load(folder: Path, text: str) -> Study:
    file = folder / "study.yaml"
    file.write_text(text)
    return load_study(file)


def method(folder: Path, entry: str, name: str = "lora", head: str = HEAD) -> Any:
    """The spec of a single method, whose hyperparameters are given as a flow mapping."""
    return load(folder, f"{head}methods:\n  {name}: {{{entry}}}\n").methods[name]


def assert_problems(folder: Path, marked: str, *messages: str) -> None:
    """The text without its § marks has one problem at each mark, in order, with these words (regular expressions)."""
    places = []
    for number, line in enumerate(marked.splitlines(), 1):
        for count, mark in enumerate(re.finditer("§", line)):
            places.append((number, mark.start() + 1 - count))
    with pytest.raises(StudyError) as caught:
        load(folder, marked.replace("§", ""))
    problems = caught.value.problems
    assert [(p.line, p.column) for p in problems] == places, "\n" + str(caught.value)
    for problem, message in zip(problems, messages, strict=True):
        assert re.search(message, str(problem)), f"{problem} does not say {message!r}"
        assert problem.file == str(folder / "study.yaml")


def test_example(tmp_path: Path) -> None:
    for name in ("minilm-l3-8k", "movie_sentiment"):
        (tmp_path / "assets" / name).mkdir(parents=True)
    study = load(tmp_path, QUICKSTART)
    assert study.name == "quickstart"
    assert study.text == QUICKSTART
    assert study.path == tmp_path / "study.yaml"
    assert study.model.path == str(tmp_path / "assets" / "minilm-l3-8k")
    assert study.data.path == str(tmp_path / "assets" / "movie_sentiment")
    assert [(spec.label, spec.method) for spec in study.methods.values()] == [
        ("lora", "lora"),
        ("tokens_with_lora", "lora"),
        ("ia3", "ia3"),
        ("trainable_tokens", "trainable_tokens"),
    ]
    lora = study.methods["lora"]
    assert lora.adapter == {
        "r": Choice((4, 8, 16)),
        "lora_alpha": Constant(16),
        "target_modules": Choice((["query", "value"], "all-linear")),
    }
    assert lora.training == {"learning_rate": Range(1e-4, 1e-2, log=True)}
    assert study.methods["tokens_with_lora"].adapter["trainable_token_indices"] == Choice(
        (Tokens(most_informative=32), Tokens(most_informative=128))
    )
    assert study.methods["trainable_tokens"].adapter["token_indices"] == Choice(
        (
            Tokens(ids=(5, 7)),
            Tokens(strings=("movie", "film")),
            Tokens(new_tokens=("<a>",)),
            Tokens(most_frequent=64),
            Tokens(most_informative=64),
        )
    )


SIX_MISTAKES = """\
study: six
model:
  path: some/model
  task: §SEQ_CLASS
data: {path: some/data, text: text, label: label}
training:
  steps: 10
  §lerning_rate: 1e-3
methods:
  lora:
    r: {values: [8, §0]}
    lora_alpha: 16
    §lora_alpha: 32
  ia3:
    learning_rate: {min: §1e-2, max: 1e-4}
budget: §{}
"""


def test_six_mistakes_at_once(tmp_path: Path) -> None:
    assert_problems(
        tmp_path,
        SIX_MISTAKES,
        "task should be 'SEQ_CLS'",
        r"unknown key 'lerning_rate' \(did you mean learning_rate\?\)",
        "`r` should be a positive integer",
        r"duplicate key 'lora_alpha' \(first on line 12\)",
        "min 0.01 is above max 0.0001",
        "budget has no end",
    )


METHODS = "methods: {lora: {}}\n"

# the whole text, then what the problems say
FILES = {
    "empty": ("§", ["the file is empty"]),
    "not a mapping": ("§- study\n", ["a study file is a mapping"]),
    "syntax": ("study: tiny\nmodel: §{path: x\n", ["not valid YAML"]),
    "two documents": ("a: 1\n§--- \nb: 1\n", ["not valid YAML.*another document"]),
    "control character": ("study: tiny\nmodel: §\x07\n", ["control character"]),
    "alias of itself": ("§study: &a [*a]\n", ["nested too deeply"]),
    "tag": (
        HEAD + METHODS + "search: {seed: §!!python/object:os.system x}\n",
        ["tag.*not supported"],
    ),
    "key of many words": (HEAD + METHODS + "? §[a, b]\n: 1\n", ["key must be a single word"]),
    "number as key": (HEAD + METHODS + "§3: 1\n", ["3 cannot be a key"]),
    "unknown section": (HEAD + METHODS + "§serch: {}\n", [r"unknown key 'serch' \(did you mean search\?\)"]),
    "study's own attribute": (HEAD + METHODS + "§path: x\n", ["unknown key 'path'"]),
    "missing section": ("§" + HEAD.replace("training: {steps: 10}\n", "") + METHODS, ["missing key 'training'"]),
    "missing key": (HEAD.replace("training: {steps: 10}", "§training: {seed: 1}") + METHODS, ["missing key 'steps'"]),
    "empty section": (
        HEAD.replace("training: {steps: 10}", "§training:") + METHODS,
        ["training should be a mapping, not None"],
    ),
    "float for int": (
        HEAD.replace("steps: 10", "steps: §1e4") + METHODS,
        [r"steps should be a valid integer, not 10000.0 \(write 10000\)"],
    ),
    "string for int": (
        HEAD.replace("steps: 10", "steps: §'10'") + METHODS,
        ["steps should be a valid integer, not '10'"],
    ),
    "yes is a word": (
        HEAD.replace("steps: 10", "steps: 10, base_dropout: §yes") + METHODS,
        ["valid boolean, not 'yes'"],
    ),
    "out of bounds": (HEAD.replace("steps: 10", "steps: §0") + METHODS, ["steps should be greater than 0, not 0"]),
    "key of a mapping": (
        HEAD.replace("label: label", "label: label, max_rows: {§trian: 5}") + METHODS,
        ["'trian' cannot be"],
    ),
    "study's name": (HEAD.replace("tiny", "§.tiny") + METHODS, ["'.tiny' cannot be a study's name.*letters"]),
    "study's number": (
        HEAD.replace("tiny", "§12") + METHODS,
        [r"study should be a valid string, not 12 \(put it in quotes"],
    ),
    "missing columns": (
        HEAD.replace("data: {path: some/data, text: text, label: label}", "§§data: {path: some/data}") + METHODS,
        ["missing key 'text', which SEQ_CLS needs|'text'.*SEQ_CLS needs", "'label'"],
    ),
    "columns of tags": (
        HEAD.replace("SEQ_CLS", "TOKEN_CLS").replace("data:", "§§data:") + METHODS,
        ["'tokens'.*TOKEN_CLS", "'tags'"],
    ),
    "column of targets": (HEAD.replace("SEQ_CLS", "SEQ_2_SEQ_LM").replace("data:", "§data:") + METHODS, ["'target'"]),
    "no data": (HEAD.replace("data: {path: some/data", "§data: {name: x") + METHODS, ["neither path nor train"]),
    "missing model": (HEAD.replace("some/model", "§./model") + METHODS, ["there is no file or folder './model'"]),
    "no hub id": (HEAD.replace("some/model", "§a/b/c") + METHODS, ["there is no file or folder 'a/b/c'"]),
    "missing file": (HEAD.replace("path: some/data", "train: §rows.csv") + METHODS, ["no file or folder 'rows.csv'"]),
    "split without a data set": (
        HEAD.replace("path: some/data", "train: §rows") + METHODS,
        ["no file 'rows'.*data.path"],
    ),
    "empty path": (HEAD.replace("some/model", "§''") + METHODS, ["no file or folder ''"]),
    "no methods": (HEAD + "methods: §{}\n", ["methods is empty"]),
    "methods as list": (HEAD + "methods: §[lora]\n", ["methods should be a mapping"]),
    "unknown method": (HEAD + "methods: {§lorra: {}}\n", ["no method 'lorra'.*did you mean lora"]),
    "unknown method named": (HEAD + "methods: {x: {method: §lorra}}\n", ["no method 'lorra'.*did you mean lora"]),
    "label": (HEAD + "methods: {§a.b: {method: lora}, §1: {}}\n", ["'a.b' cannot be a label", "1 cannot be a"]),
    "entry as list": (HEAD + "methods: {lora: §[r]}\n", ["lora should be a mapping"]),
    "unknown metric": (HEAD + METHODS + "objective: {metric: §acuracy}\n", ["did you mean accuracy"]),
    "metric of targets": (
        HEAD.replace("SEQ_CLS", "CAUSAL_LM") + METHODS + "objective: {metric: §chrf}\n",
        ["chrf needs something to compare with.*data.target"],
    ),
    "unknown metric to prune by": (
        HEAD + METHODS + "search: {prune_by: §objectiv}\n",
        ["SEQ_CLS has no metric 'objectiv'.*did you mean objective"],
    ),
    "nothing in flight": (HEAD + METHODS + "search: {in_flight: §0}\n", ["in_flight should be greater than 0"]),
    "unknown goal": (HEAD + METHODS + "objective: {goal: §max}\n", ["goal should be 'maximize' or 'minimize'"]),
    "grid over a range": (
        HEAD + "methods: {lora: {learning_rate: {min: 1e-4, max: 1e-2}}}\nsearch: {sampler: §grid}\n",
        ["lora.learning_rate is a continuous range"],
    ),
    "qmc over methods": (HEAD + "methods: {lora: {}, ia3: {}}\nsearch: {sampler: §qmc}\n", ["qmc cannot choose"]),
}


@pytest.mark.parametrize("name", FILES)
def test_problem_of_a_file(tmp_path: Path, name: str) -> None:
    assert_problems(tmp_path, FILES[name][0], *FILES[name][1])


# one method's hyperparameters as a flow mapping, then what the problems say
ENTRIES = {
    "unknown key": ("§lora_alfa: 3", [r"unknown key 'lora_alfa' \(did you mean lora_alpha\?\)"]),
    "bookkeeping": ("§task_type: SEQ_CLS", ["unknown key 'task_type'"]),
    "type": ("r: §'8'", ["r should be a valid integer, not '8'"]),
    "float for int": ("r: §1e1", [r"r should be a valid integer, not 10.0 \(write 10\)"]),
    "type in a list": (
        "target_modules: §[query, 3]",
        ["target_modules should be a list of strings or a string or null"],
    ),
    "type in a choice": ("r: {values: [8, §high]}", ["r should be a valid integer, not 'high'"]),
    "type in a mapping": ("rank_pattern: §{query: many}", ["rank_pattern should be a valid integer, not 'many'"]),
    "not finite": ("lora_dropout: §.nan", ["lora_dropout must be finite"]),
    "training type": ("schedule: §step", ["schedule should be 'linear', 'cosine' or 'constant'"]),
    "training bound": ("warmup: {values: [0, §1]}", ["warmup should be less than 1"]),
    "refused by the method": (
        "bias: §some, r: {values: [8, §0]}",
        ["bias must be none, all", "`r` should be a positive"],
    ),
    "two refused": ("r: §0, lora_dropout: §2.0", ["`r` should be", "lora_dropout must be"]),
    "end of a range": ("r: {min: §0, max: 8}", ["`r` should be a positive"]),
    "typo in a domain": ("r: {§valeus: [1, 2]}", ["did you mean values"]),
    "two forms": ("§r: {value: 8, values: [8]}", ["r has both constant and categorical values"]),
    "no form": ("§r: {distribution: uniform}", ["r has no values"]),
    "empty values": ("r: {values: §[]}", ["at least one value"]),
    "values not a list": ("r: {values: §8}", ["values must be a list"]),
    "doubled values": ("r: {values: [8, 4, §8]}", ["8 is listed twice"]),
    "doubled lists": ("target_modules: {values: [[query], §[query]]}", ["listed twice"]),
    "missing bound": ("§r: {min: 1}", ["missing key 'max'"]),
    "bound as text": ("learning_rate: {min: §low, max: 1}", ["min must be a number"]),
    "endless bound": ("learning_rate: {min: 1, max: §.inf}", ["max must be a number"]),
    "min above max": ("r: {min: §9, max: 2}", ["min 9 is above max 2"]),
    "log from zero": (
        "weight_decay: {min: §0, max: 1, distribution: log_uniform_values}",
        ["min must be above 0 for log_uniform_values"],
    ),
    "exponents": (
        "learning_rate: {min: 1, max: 2, distribution: §log_uniform}",
        ["bounds would be exponents.*log_uniform_values"],
    ),
    "unknown distribution": ("r: {min: 1, max: 2, distribution: §int_unifrom}", ["did you mean int_uniform"]),
    "distribution of another form": ("r: {values: [1, 2], distribution: §int_uniform}", ["needs min and max"]),
    "fractions for int": ("r: {min: 1, max: 8, distribution: §uniform}", ["r takes whole numbers.*int_uniform"]),
    "fractional bound": ("r: {min: 1, max: §8.5}", ["max must be a whole number, not 8.5"]),
    "bound as float": ("r: {min: 1, max: §1e1}", [r"max must be a whole number, not 10.0 \(write 10\)"]),
    "no step": ("r: {min: 1, max: 8, q: §0}", ["q must be above 0"]),
    "tiny step": ("learning_rate: {min: 0.1, max: 1, q: §1e-300}", ["q must be above 0 and cut the range"]),
    "step of a choice": ("r: {values: [1, 2], §q: 1}", ["q goes with min and max"]),
    "step without q_": (
        "learning_rate: {min: 0.1, max: 1, §q: 0.1, distribution: log_uniform_values}",
        ["use q_log_uniform_values"],
    ),
    "range of words": ("bias: {min: §1, max: §2}", ["bias should be", "bias should be"]),
    "tokens of nothing": ("trainable_token_indices: §[]", ["at least one token"]),
    "token types": (
        "trainable_token_indices: [§1.5, §null, §true, §'', 7]",
        ["1.5 is not an id", "None", "True", "''"],
    ),
    "negative token": ("trainable_token_indices: [1, §-1]", ["count from 0"]),
    "doubled token": ("trainable_token_indices: [film, §film]", ["listed twice"]),
    "one token": ("trainable_token_indices: §film", [r"tokens are a list.*write \[film\]"]),
    "ids as new tokens": ("trainable_token_indices: {new_tokens: [§5]}", ["5 is not a token"]),
    "typo in tokens": ("trainable_token_indices: {§most_informativ: 5}", ["did you mean most_informative"]),
    "two kinds of tokens": ("trainable_token_indices: §{most_informative: 5, most_frequent: 5}", ["mixes"]),
    "no tokens": (
        "trainable_token_indices: {most_frequent: {values: [5, §0]}}",
        ["number of tokens should be greater"],
    ),
    "ranges of one kind": (
        "trainable_token_indices: {values: [{most_frequent: {min: 1, max: 2}}, {most_frequent: §{min: 5, max: 9}}]}",
        ["'most_frequent' is listed twice"],
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_problem_of_a_method(tmp_path: Path, name: str) -> None:
    entry, messages = ENTRIES[name]
    assert_problems(tmp_path, f"{HEAD}methods:\n  lora: {{{entry}}}\n", *messages)


def test_faults_of_combinations(tmp_path: Path) -> None:
    """Values that are right alone but not together, where the method blames a field, and neither is the first."""
    ia3 = "ia3: {feedforward_modules: {values: [[], §[dense]]}, target_modules: {values: [[dense], [key]]}}"
    assert_problems(
        tmp_path, f"{HEAD}methods: {{{ia3}}}\n", r"should be a subset.*together with target_modules: \['key'\]"
    )
    lora = "lora: {layers_to_transform: {values: [null, §[0]]}, target_modules: {values: [[key], all-linear]}}"
    assert_problems(tmp_path, f"{HEAD}methods: {{{lora}}}\n", "together with target_modules: all-linear")


def test_tokens_are_needed(tmp_path: Path) -> None:
    assert_problems(tmp_path, HEAD + "methods: {§trainable_tokens: {}}\n", "missing key 'token_indices'")


def test_most_informative_needs_labels(tmp_path: Path) -> None:
    head = HEAD.replace("SEQ_CLS", "CAUSAL_LM")
    entry = "trainable_tokens: {token_indices: {values: [[1], {most_informative: §64}]}}"
    assert_problems(tmp_path, f"{head}methods: {{{entry}}}\n", "CAUSAL_LM has none.*use most_frequent")


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(StudyError) as caught:
            load_study(path)
        (problem,) = caught.value.problems
        assert (problem.file, problem.line, problem.column) == (str(path), 1, 1)
        assert "cannot be read" in problem.message


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(b"study: tiny\nmodel: \xff\n")
    with pytest.raises(StudyError, match=r"study.yaml:2:1: the file is not UTF-8"):
        load_study(tmp_path / "study.yaml")


@pytest.mark.parametrize("number", ["1e-4", "1.e-4", "0.0001", "1E-4", "+1e-04"])
def test_numbers_of_yaml_1_2(tmp_path: Path, number: str) -> None:
    assert method(tmp_path, f"learning_rate: {number}").training == {"learning_rate": Constant(1e-4)}


DOMAINS = {
    "r: 8": Constant(8),
    "r: {value: 8}": Constant(8),
    "r: {value: 8, distribution: constant}": Constant(8),
    "r: {values: [8]}": Choice((8,)),
    "r: {values: [4, 8], distribution: categorical}": Choice((4, 8)),
    "r: {min: 1, max: 9}": Range(1, 9),
    "r: {min: 1, max: 9, q: 3}": Range(1, 7, q=3),
    "r: {min: 1, max: 9, distribution: int_uniform}": Range(1, 9),
    "r: {min: 2, max: 64, distribution: log_uniform_values}": Range(2, 64, log=True),
    "r: {min: 2, max: 9, distribution: q_log_uniform_values, q: 2}": Range(2, 8, log=True, q=2),
    "lora_dropout: {min: 0, max: 0.5}": Range(0.0, 0.5),
    "lora_dropout: {min: 0.1, max: 0.45, distribution: q_uniform, q: 0.1}": Range(0.1, 0.4, q=0.1),
    "layers_to_transform: {min: 0, max: 3}": Range(0, 3),
    "layers_to_transform: null": Constant(None),
    "rank_pattern: {query: 4}": Constant({"query": 4}),
    "rank_pattern: {}": Constant({}),
    "rank_pattern: {value: 4, query: 4}": Constant({"value": 4, "query": 4}),
    "rank_pattern: {values: [{query: 4}, {query: 8}]}": Choice(({"query": 4}, {"query": 8})),
    "trainable_token_indices: [5, film]": Constant(Tokens(ids=(5,), strings=("film",))),
    "trainable_token_indices: {most_frequent: 8}": Constant(Tokens(most_frequent=8)),
    "trainable_token_indices: {value: {most_frequent: 8}}": Constant(Tokens(most_frequent=8)),
    "trainable_token_indices: {most_frequent: {min: 8, max: 64}}": TokenRange("most_frequent", Range(8, 64)),
    "trainable_token_indices: {values: [null, [2020-01-01], {most_frequent: {min: 8, max: 64}}]}": Choice(
        (None, Tokens(strings=("2020-01-01",)), TokenRange("most_frequent", Range(8, 64)))
    ),
}


@pytest.mark.parametrize("entry", DOMAINS)
def test_domains(tmp_path: Path, entry: str) -> None:
    (domain,) = method(tmp_path, entry).adapter.values()
    assert domain == DOMAINS[entry]
    if isinstance(domain, Range):
        assert type(domain.low) is type(domain.high) is type(DOMAINS[entry].low)


@pytest.mark.parametrize(
    ("task", "columns", "metric", "goal"),
    [
        ("SEQ_CLS", "text: a, label: b", "accuracy", "maximize"),
        ("TOKEN_CLS", "tokens: a, tags: b", "f1", "maximize"),
        ("CAUSAL_LM", "text: a", "loss", "minimize"),
        ("SEQ_2_SEQ_LM", "text: a, target: b", "chrf", "maximize"),
    ],
)
def test_objective_by_task(tmp_path: Path, task: str, columns: str, metric: str, goal: str) -> None:
    text = HEAD.replace("SEQ_CLS", task).replace("text: text, label: label", columns) + METHODS
    objective = load(tmp_path, text).objective
    assert (objective.metric, objective.goal) == (metric, goal)


@pytest.mark.parametrize(
    ("objective", "prune_by", "value"),
    [
        ("accuracy", "loss", -0.25),
        ("accuracy", "objective", 0.75),
        ("accuracy", "mcc", 0.5),
        ("loss", "loss", 0.25),
        ("loss", "accuracy", -0.75),
        ("accuracy, goal: minimize", "objective", 0.75),
        ("accuracy, goal: minimize", "loss", 0.25),
    ],
)
def test_what_is_compared_has_the_direction_of_the_objective(
    tmp_path: Path, objective: str, prune_by: str, value: float
) -> None:
    study = load(tmp_path, HEAD + METHODS + f"objective: {{metric: {objective}}}\nsearch: {{prune_by: {prune_by}}}\n")
    assert study.to_compare({"accuracy": 0.75, "loss": 0.25, "mcc": 0.5}) == value


def test_goal_follows_the_metric(tmp_path: Path) -> None:
    assert load(tmp_path, HEAD + METHODS + "objective: {metric: loss}\n").objective.goal == "minimize"
    assert load(tmp_path, HEAD + METHODS + "objective: {metric: mcc}\n").objective.goal == "maximize"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies next to the study file becomes absolute, also for a file named from elsewhere; the rest are hub ids."""
    (tmp_path / "here" / "base").mkdir(parents=True)
    (tmp_path / "here" / "train").mkdir()  # a folder, while `data.train` below is the split's name
    (tmp_path / "here" / "rows.csv").write_text("text,label\n")
    monkeypatch.chdir(tmp_path)
    head = HEAD.replace("some/model", "base, tokenizer: org/name").replace(
        "path: some/data", "path: org/data, train: train, validation: rows.csv"
    )
    (tmp_path / "here" / "study.yaml").write_text(head + METHODS)
    study = load_study("here/study.yaml")
    assert study.model.path == str(tmp_path / "here" / "base")
    assert study.model.tokenizer == "org/name"
    assert (study.data.path, study.data.train) == ("org/data", "train")
    assert study.data.validation == str(tmp_path / "here" / "rows.csv")


def test_tokens_describe() -> None:
    assert Tokens(most_informative=64).describe() == "most_informative=64"
    assert Tokens(ids=(5,), strings=("film",)).describe() == "5, film"
    assert Tokens(new_tokens=("<a>", "<b>")).describe() == "new_tokens=<a>, <b>"
    assert Tokens(ids=(1, 2, 3, 4, 5)).describe() == "1, 2, 3, ... (5)"


def test_import_is_light() -> None:
    check = "import sys, workbench.sweep.spec; print({'mlflow', 'datasets', 'streamlit'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def shipped() -> list[Path]:
    return sorted((ROOT / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_shipped_studies(path: Path) -> None:
    load_study(path)
    jsonschema.Draft202012Validator(json_schema()).validate(source.read(path).data)


def documented() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "study.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", documented())
def test_documented_blocks(tmp_path: Path, block: str) -> None:
    """Those that show only some sections replace them in the first block, a whole study."""
    for file in ("train.csv", "validation.csv"):
        (tmp_path / file).touch()
    (tmp_path / "whole.yaml").write_text(documented()[0])
    (tmp_path / "block.yaml").write_text(block)
    data = source.read(tmp_path / "whole.yaml").data | source.read(tmp_path / "block.yaml").data
    load(tmp_path, json.dumps(data))
    jsonschema.Draft202012Validator(json_schema()).validate(data)


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "study.md").read_text()

    def inside(section: Any) -> set[str]:
        """The keys of a section, and of the sections in it."""
        fields = getattr(section, "model_fields", {})
        parts = [part for field in fields.values() for part in (field.annotation, *get_args(field.annotation))]
        return {field.alias or name for name, field in fields.items()}.union(*map(inside, parts))

    keys = inside(StudyFile)
    assert {"per_method", "initialisations", "tokens"} <= keys
    keys |= {metric for metrics in METRICS.values() for metric in metrics}
    keys |= {*DISTRIBUTIONS, *TOKEN_KEYS, *PER_METHOD}
    assert {key for key in keys if not re.search(rf"\b{key}\b", page)} == set()


class TestSchema:
    validator = jsonschema.Draft202012Validator(json_schema())

    def accepts(self, text: str, folder: Path) -> bool:
        (folder / "study.yaml").write_text(text)
        return self.validator.is_valid(source.read(folder / "study.yaml").data)

    def test_is_a_schema(self) -> None:
        jsonschema.Draft202012Validator.check_schema(json_schema())
        assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"

    def test_example(self, tmp_path: Path) -> None:
        assert self.accepts(QUICKSTART, tmp_path)

    @pytest.mark.parametrize("entry", DOMAINS)
    def test_domains(self, tmp_path: Path, entry: str) -> None:
        assert self.accepts(f"{HEAD}methods: {{lora: {{{entry}}}, x: {{method: lora, {entry}}}}}", tmp_path)

    @pytest.mark.parametrize(
        "name",
        ["unknown key", "bookkeeping", "type", "type in a choice", "training type", "typo in a domain", "no form",
         "empty values", "missing bound", "bound as text", "exponents", "tokens of nothing", "doubled token",
         "one token"],
    )  # fmt: skip
    def test_wrong_entries(self, tmp_path: Path, name: str) -> None:
        entry = ENTRIES[name][0].replace("§", "")
        assert not self.accepts(f"{HEAD}methods: {{lora: {{{entry}}}}}", tmp_path)
        assert not self.accepts(f"{HEAD}methods: {{x: {{method: lora, {entry}}}}}", tmp_path)

    @pytest.mark.parametrize(
        "name",
        ["unknown section", "missing section", "missing key", "string for int", "study's name", "unknown method",
         "no methods"],
    )  # fmt: skip
    def test_wrong_files(self, tmp_path: Path, name: str) -> None:
        assert not self.accepts(FILES[name][0].replace("§", ""), tmp_path)

    def test_describes_hyperparameters(self) -> None:
        lora = json_schema()["$defs"]["method_lora"]["properties"]
        assert lora["r"]["description"] == "rank of the update."
        assert lora["learning_rate"]["description"]
        assert all(field["description"] for name, field in lora.items() if name != "method")


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, len(QUICKSTART)),
        st.integers(0, 12),
        st.one_of(
            st.sampled_from(
                ["", " ", "\n", "\n  ", ":", ": ", "- ", "{", "}", "[", "]", "{}", "[]", "null", "~", "0", "-1", "1e4",
                 "1e400", ".nan", ".inf", "9" * 5000, "true", "'", '"', "#", "&a ", "*a", "<<", "!!set ", "!x ", "? ",
                 "|", "%YAML 1.1", "---", "\t", "\x00", "lora", "values", "min", "max", "q", "distribution",
                 "most_frequent", "new_tokens", "2020-01-01"]
            ),
            st.text(max_size=4),
        ),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(mutations=MUTATIONS)
def test_mutations_raise_only_study_errors(tmp_path: Path, mutations: list[tuple[int, int, str]]) -> None:
    text = QUICKSTART
    for start, length, replacement in mutations:
        text = text[:start] + replacement + text[start + length :]
    (tmp_path / "study.yaml").write_bytes(text.encode(errors="surrogatepass"))
    problems = found(tmp_path / "study.yaml")
    lines = text.count("\n") + text.count("\r") + 1
    assert all(1 <= problem.line <= lines + 1 and problem.column >= 1 for problem in problems)


def found(path: Path) -> list[Problem]:
    try:
        load_study(path)
    except StudyError as error:
        return error.problems
    return []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["value", "values", "min", "max", "q", "distribution", "new_tokens", "most_frequent"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
PLACES = [
    "study",
    "model.path",
    "model.task",
    "data.path",
    "data.train",
    "data.text",
    "training.steps",
    "training.learning_rate",
    "methods",
    "methods.lora",
    "methods.lora.r",
    "methods.lora.rank_pattern",
    "methods.lora.trainable_token_indices",
    "methods.lora.learning_rate",
    "methods.lora.schedule",
    "methods.lora.method",
    "methods.trainable_tokens.token_indices",
    "methods.ia3.target_modules",
    "objective.metric",
    "budget.minutes",
    "search.seed",
    "search.prune_by",
    "search",
]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_anywhere_raises_only_study_errors(tmp_path: Path, place: str, value: Any) -> None:
    (tmp_path / "study.yaml").write_text(QUICKSTART)
    data = source.read(tmp_path / "study.yaml").data
    inner = data
    *sections, last = place.split(".")
    for key in sections:
        inner = inner[key]
    inner[last] = value
    # JSON's NaN and Infinity have other names in YAML
    text = json.dumps(data).replace("NaN", ".nan").replace("Infinity", ".inf")
    (tmp_path / "study.yaml").write_text(text)
    found(tmp_path / "study.yaml")

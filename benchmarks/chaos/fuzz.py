"""Study files and checkpoints with something wrong in them: each must be refused with a typed error, or do.

    python -m benchmarks.chaos.fuzz --studies 300 --checkpoints 200 --seed 1

The files are drawn by hypothesis, from the shipped studies with a tiny model and little data, and from real
checkpoints. What is valid is run: one trial of two steps. Every other exception, code that runs out of a file, and
everything that is written outside the case's own folder is a failure. Prints JSON: how many were refused by which
error, what became of the others, the failures with their files, and the seed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import optuna
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from ruamel.yaml import YAML
from transformers import BertConfig, BertModel

from workbench.adapters import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from workbench.cli import stores
from workbench.errors import WorkbenchError
from workbench.sweep.budget import PROGRESS
from workbench.sweep.display import Display
from workbench.sweep.roles import OUTCOME
from workbench.sweep.run import sweep
from workbench.sweep.spec import BudgetSection, Study, load_study
from workbench.tracking.runs import default_store, open_tracking
from workbench.training.base import load_base
from workbench.training.bench import Bench, Stint
from workbench.training.config import ModelSection, TrainingSection
from workbench.training.data import read_data, tokenize
from workbench.training.trainee import Trainee

from .mutations import json_files, read_bytes, safetensors_files, study_files, written
from .watch import watched

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "studies" / "assets"
ROWS = {"train": 24, "validation": 8, "test": 8}
MEMORY = 12 * 2**30  # bytes of addresses: what asks for more fails at once
MODEL, DATA = "model", "data"  # folders beside the cases
METHODS = {  # a word or two of each that the shipped studies leave out
    "loha": {"r": 2, "target_modules": ["query"]},
    "adalora": {"init_r": 2, "target_r": 1, "target_modules": ["query"], "tinit": 0, "tfinal": 0},
    "prompt_tuning": {"num_virtual_tokens": {"min": 1, "max": 3}},
    "full": {"learning_rate": 1e-4},
}


@dataclass
class Found:
    """What came of a number of files.

    Attributes:
        refused: how many by which error.
        ran: how many of the others came to which end.
        failures: what may not be, with the file that did it.
    """

    files: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    ran: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)


class Place:
    """A folder with a tiny model, a little data, studies of them, and a folder for each case.

    Attributes:
        root: nothing in it but `cases` may change.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.count = 0
        for name in (MODEL, DATA, "cases", "outside"):
            (self.root / name).mkdir()
        (self.root / "outside" / "canary").write_text("alive")
        self._make_model()
        self._make_data()
        home = self.root / "empty"
        where = stores(home, None, None)
        open_tracking(*default_store(home))
        optuna.storages.RDBStorage(where.optuna)
        self.studies = [*self._shipped(), self._further()]
        self.before = self._state()

    def _make_model(self) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ASSETS / "minilm-l3-8k" / name, self.root / MODEL)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(vocab_size=8000, max_position_embeddings=64, initializer_range=0.3, **sizes)
        torch.manual_seed(1)
        BertModel(config, add_pooling_layer=False).save_pretrained(self.root / MODEL)

    def _make_data(self) -> None:
        for folder in ("movie_sentiment", "us_addresses", "wordnet_topics", "cmudict_pronunciation"):
            (self.root / DATA / folder).mkdir()
            (train,) = (ASSETS / folder).glob("train.*")
            lines = train.read_text().splitlines(keepends=True)
            for split, rows in ROWS.items():  # of the same rows, so that every label is in each
                head = 0 if train.suffix == ".jsonl" else 1
                (self.root / DATA / folder / f"{split}{train.suffix}").write_text("".join(lines[: head + rows]))

    def _shipped(self) -> Iterator[str]:
        """The shipped studies, of the tiny model and data."""
        for file in sorted((ROOT / "studies").glob("*.yaml")):
            data = YAML(typ="safe", pure=True).load(file.read_text())
            if data["model"]["path"] == "assets/minilm-l3-8k":
                data["model"]["path"] = f"../../{MODEL}"
            else:
                data["model"]["path"] = str(ASSETS / Path(data["model"]["path"]).name)
            data["data"]["path"] = f"../../{DATA}/{Path(data['data']['path']).name}"
            data["training"] |= {"device": "cpu", "steps": 2, "eval_every": 1}
            for values in filter(None, data["methods"].values()):
                values |= dict.fromkeys({"tinit", "tfinal"} & values.keys(), 0)
            yield written(data | {"methods": few(data["methods"])})

    def _further(self) -> str:
        """A study of methods that these leave out."""
        data = YAML(typ="safe", pure=True).load(self.studies_first())
        return written(data | {"study": "further", "methods": METHODS, "budget": {"per_method": {"trials": 1}}})

    def studies_first(self) -> str:
        """The first shipped study."""
        return next(iter(self._shipped()))

    def _state(self) -> dict[str, tuple[int, int]]:
        """Sizes and times of all files that no case may touch."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            if Path(folder) == self.root:
                folders.remove("cases")
            for name in (*folders, *files):
                about = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = about.st_size, about.st_mtime_ns
        return found

    @contextmanager
    def case(self, found: Found, content: bytes) -> Iterator[Path]:
        """A folder for one case, in which what may not happen is noted."""
        folder = self.root / "cases" / str(self.count)
        self.count, found.files = self.count + 1, found.files + 1
        folder.mkdir()
        faults = []
        try:
            # what libraries keep for themselves lies in the folder that tempfile names
            with watched([folder], self.root) as watch:
                yield folder
            faults += watch.seen
        except WorkbenchError as error:
            found.refused[type(error).__name__] += 1
            faults += watch.seen
            if "secret" in str(error) or "Traceback" in str(error):
                faults.append(f"it tells too much: {error}")
            str(error).encode()  # it can be printed
        except Exception:
            faults.append(traceback.format_exc())
        if (after := self._state()) != self.before:
            faults.append(f"changed: {sorted(set(after.items()) ^ set(self.before.items()))[:5]}")
            self.before = after
        if faults:
            found.failures.append({"why": "\n".join(faults)[-3000:], "file": repr(content)[:3000]})
        shutil.rmtree(folder)


@contextmanager
def place() -> Iterator[Place]:
    """A place that is gone afterwards. Meanwhile this is one process with one thread and not all of the memory."""
    threads, limits, temp = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_AS), tempfile.tempdir
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Place(Path(name))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
        try:
            yield made
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            torch.set_num_threads(threads)
            tempfile.tempdir = temp


# -------------------------------------------------------------------- study files


def few(values: Any, tokens: bool = False) -> Any:
    """The same with fewer tokens to train, of which little data has not many."""
    if isinstance(values, dict):
        return {key: few(value, tokens or key.startswith("most_")) for key, value in values.items()}
    if isinstance(values, list):
        return [few(value, tokens) for value in values]
    return values.bit_length() if tokens and isinstance(values, int) else values


def small(study: Study) -> Study:
    """The study with one trial of two steps on a few rows."""
    rows = {name: min(8, study.data.max_rows.get(name, 8)) for name in ("train", "validation", "test")}
    training = study.training.model_copy(
        update={
            "steps": 2,
            "eval_every": None,
            "batch_size": min(4, study.training.batch_size),
            "eval_batch_size": min(8, study.training.eval_batch_size),
            "compile": False,  # takes a compiler and a minute
        }
    )
    lengths = {"max_length": min(16, study.data.max_length), "max_target_length": min(16, study.data.max_target_length)}
    return study.model_copy(
        update={
            "training": training,
            "data": study.data.model_copy(update={"max_rows": rows, **lengths}),
            "budget": BudgetSection(trials=1),
            "search": study.search.model_copy(update={"in_flight": 1}),
            "finalists": None,
        }
    )


def try_study(at: Place, found: Found, content: bytes) -> None:
    """Read a study file and run it, if it can be."""
    with at.case(found, content) as folder:
        file, home = folder / "study.yaml", folder / "home"
        file.write_bytes(content)
        study = small(load_study(file))
        shutil.copytree(at.root / "empty", home)
        tempfile.tempdir = str(folder)
        try:
            trials = sweep(study, stores(home, None, None), Display(study, Console(file=io.StringIO())), workers=1)
        finally:
            tempfile.tempdir = None
        ends = [trial.user_attrs.get(OUTCOME, "none") for trial in trials]
        found.ran.update(ends)
        if not set(ends) <= {"complete", "infeasible", "diverged", "out_of_memory", "timed_out", "pruned"} or not ends:
            faults = [file.read_text() for file in home.rglob("traceback.txt")]
            raise AssertionError(f"{ends} {[trial.user_attrs.get(PROGRESS) for trial in trials]}\n{''.join(faults)}")


# -------------------------------------------------------------------- checkpoints


class Workplace:
    """A base model, a trial's checkpoints and saved adapters of it.

    Attributes:
        stints: of each method, with the bytes of a checkpoint after two of four steps.
        adapters: the files of a saved adapter of each method.
    """

    CONFIGS: tuple[Callable[[], Any], ...] = (
        lambda: LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"),
        lambda: AdaLoraConfig(
            init_r=3, target_r=1, target_modules=["query"], total_step=4, tinit=0, tfinal=1, task_type="SEQ_CLS"
        ),
        lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"),
    )

    def __init__(self, at: Place):
        study = small(load_study(self._file(at)))
        raw = read_data(study.data, study.model.task)
        section = ModelSection(path=str(at.root / MODEL), task="SEQ_CLS")
        self.base = load_base(section, raw.labels, 0, "cpu")
        self.data = tokenize(raw, self.base.tokenizer, at.root / "cases")
        self.settings = TrainingSection(steps=4, batch_size=4, device="cpu", cache_gib=0.0)
        bench, self.stints, self.adapters = Bench(self.base, self.data), [], []
        for number, make in enumerate(self.CONFIGS):
            file, saved = at.root / "cases" / f"{number}-2.safetensors", at.root / "cases" / f"adapter-{number}"
            (report,) = bench.train([self.stint(make(), file)], lambda *_: None)
            assert report.error is None, report
            self.stints.append((make, file.read_bytes()))
            model = get_peft_model(self.base.model, make())
            model.save_pretrained(saved, save_embedding_layers=False)
            model.delete_adapter("default")
            self.adapters.append(read_bytes(saved))
            shutil.rmtree(saved)
        self.base.model.requires_grad_(False)
        self.before = self.state()

    @staticmethod
    def _file(at: Place) -> Path:
        folder = at.root / "cases" / "first"
        folder.mkdir(exist_ok=True)
        (folder / "study.yaml").write_text(next(text for text in at.studies if "movie_sentiment" in text))
        return folder / "study.yaml"

    def stint(self, config: Any, file: Path, until: int = 2) -> Stint:
        """Two steps of a trial, or the next two."""
        return Stint(0, config, self.settings, 0, 0, file, until)

    def state(self) -> dict[str, Any]:
        """The base model as it must be after each case."""
        kinds = {name: type(module).__name__ for name, module in self.base.model.named_modules()}
        return kinds | {name: tensor.sum().item() for name, tensor in self.base.model.state_dict().items()}


def try_checkpoint(at: Place, work: Workplace, found: Found, number: int, content: bytes) -> None:
    """Go on with a trial from a file."""
    make, _ = work.stints[number]
    with at.case(found, content) as folder:
        file = folder / "0-2.safetensors"
        file.write_bytes(content)
        trainee = Trainee(work.base, work.data, work.stint(make(), file, 4), None, {})
        try:
            assert 0 <= trainee.step <= work.settings.steps
            assert all(p.isfinite().all() for p in trainee.parameters.values())
            found.ran["goes on"] += 1
        finally:
            trainee.remove()
    check_base(work, found, content)


def try_adapter(at: Place, work: Workplace, found: Found, number: int, name: str, content: bytes) -> None:
    """Put a saved adapter on the base."""
    with at.case(found, content) as folder:
        for other, right in work.adapters[number].items():
            (folder / other).write_bytes(content if other == name else right)
        model = PeftModel.from_pretrained(work.base.model, folder)
        try:
            assert not any(p.is_meta for p in model.parameters())
            found.ran["loaded"] += 1
        finally:
            model.delete_adapter(list(model.peft_config))
            work.base.model.requires_grad_(False)
    check_base(work, found, content)


def check_base(work: Workplace, found: Found, content: bytes) -> None:
    """See that the base model is as it was."""
    if (after := work.state()) != work.before:
        found.failures.append({"why": "the base model is not what it was", "file": repr(content)[:3000]})
        work.before = after


# -------------------------------------------------------------------- all of them


def fuzz(studies: int, checkpoints: int, number: int | None) -> dict[str, Found]:
    """Draw so many files of each kind and see what comes of them.

    Args:
        number: the seed; None: the same files every time.
    """
    done = {"studies": Found(), "checkpoints": Found()}

    def drawn(test: Callable[..., None], count: int) -> None:
        if not count:
            return
        quick = settings(
            max_examples=count,
            derandomize=number is None,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        (quick(test) if number is None else seed(number)(quick(test)))()

    with place() as at:

        @given(study_files(at.studies))
        def study(content: bytes) -> None:
            try_study(at, done["studies"], content)

        drawn(study, studies)
        if not checkpoints:
            return done
        work = Workplace(at)
        trials = st.sampled_from(range(len(work.stints)))

        @given(st.data(), trials, st.sampled_from(["trial", "trial", "weights", "config"]))
        def checkpoint(data: st.DataObject, which: int, kind: str) -> None:
            files, own = work.adapters[which], done["checkpoints"]
            if kind == "trial":
                original = work.stints[which][1]
                try_checkpoint(at, work, own, which, data.draw(safetensors_files(original)))
            elif kind == "weights":
                name = "adapter_model.safetensors"
                try_adapter(at, work, own, which, name, data.draw(safetensors_files(files[name])))
            else:
                name = "adapter_config.json"
                try_adapter(at, work, own, which, name, data.draw(json_files(files[name])))

        drawn(checkpoint, checkpoints)
    return done


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    done = fuzz(args.studies, args.checkpoints, args.seed)
    print(json.dumps({"seed": args.seed, **{kind: vars(found) for kind, found in done.items()}}, indent=2))
    sys.exit(any(found.failures for found in done.values()))


if __name__ == "__main__":
    main()

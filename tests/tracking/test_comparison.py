from __future__ import annotations

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from command import workbench
from made_up import EXAMPLES, SEEDS, finalist, finished_study, open_study, right, trial, write_predictions
from rich.console import Console

from workbench.errors import DataError, StorageError
from workbench.tracking import compare_formats as formats
from workbench.tracking import stats
from workbench.tracking.comparison import compare
from workbench.tracking.frames import study_run
from workbench.tracking.runs import default_store, open_client, open_tracking
from workbench.tracking.stats import Scores


@pytest.fixture(scope="module")
def home(template, tmp_path_factory):
    """A store with a study that is finished and promoted."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(template, home / "mlflow.db")
    finished_study(open_tracking(*default_store(home)), home / "predictions", test=True)
    return home


@pytest.fixture
def compare_again(home, tmp_path):
    """Compares that study, as if its run had other tags."""

    def again(split="validation", **tags):
        shutil.copy(home / "mlflow.db", tmp_path / "again.db")  # its artifacts stay where they are
        uri = f"sqlite:///{tmp_path / 'again.db'}"
        client = open_client(uri)
        for key, value in tags.items():
            client.set_tag(study_run(client, uri, "s").info.run_id, f"workbench.{key}", value)
        return compare(uri, "s", split)

    return again


@pytest.fixture(scope="module")
def finished(home):
    return compare(default_store(home)[0], "s", "validation")


def row(found, label):
    (only,) = [row for row in found.rows if row.label == label]
    return only


def scores(first):
    share = {17: 0.84, 23: 0.83, 29: 0.6}[first]
    return Scores(np.array([right(share, number) for number in range(first, first + 6)]), SEEDS)


def in_terminal(found):
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(formats.table(found))
    return console.export_text()


# -------------------------------------------------------------------- data


def test_finalists_are_rows_best_first(finished):
    assert [(r.label, r.trial, r.kind, r.runs) for r in finished.rows] == [
        ("good", 1, "finalist", 6),
        ("alike", 5, "finalist", 6),
        ("bad", 9, "finalist", 6),
        ("lost", 12, "one run", 1),
    ]
    assert (finished.split, finished.examples, finished.costs) == ("validation", EXAMPLES, ("trainable_params",))
    good = row(finished, "good")
    assert good.name == "good (lora)"
    assert good.value == pytest.approx(0.84)
    assert good.judged.estimate == stats.estimate(scores(17))
    assert (good.trainable_params, good.adapter_bytes, good.seconds, good.memory) == (400, 2048, 2.5, 40 + 22)
    assert finished.memory == "tensors' peak, MiB"
    assert good.hyperparameters == {"learning_rate": 1e-3, "r": 8}


def test_ties_and_differences_are_those_of_the_scores(finished):
    three = [scores(17), scores(23), scores(29)]
    ties = stats.tied_with_best(three, "maximize")
    assert [row(finished, name).judged.tied for name in ("good", "alike", "bad")] == ties.tied == [True, True, False]
    assert [row(finished, name).judged.best for name in ("good", "alike", "bad")] == [True, False, False]
    assert row(finished, "good").judged.behind is None
    behind = row(finished, "bad").judged.behind
    assert behind.p == ties.p[0, 2] < 0.001
    assert behind.difference == stats.difference(three[2], three[0])
    assert behind.difference.value == pytest.approx(-0.24)
    assert behind.bootstrap == stats.paired_bootstrap(three[2], three[0])


def test_pareto_probabilities_weigh_the_costs(finished):
    good, alike, bad = (row(finished, name).judged.front for name in ("good", "alike", "bad"))
    assert alike == 1  # the cheapest
    assert 0.5 < good < 1  # dearer, and better in most draws
    assert bad == 0


def test_tuned_against_default_on_validation(finished):
    good = row(finished, "good")
    assert (good.default, good.gain) == pytest.approx((0.74, 0.1))
    lost = row(finished, "lost")
    assert np.isnan([lost.default, lost.gain]).all()


def test_a_default_that_was_best_gained_nothing(tracking):
    study = open_study(tracking)
    trial(study, 0, value=0.9, role="default")
    trial(study, 1, value=0.8)
    (only,) = compare(tracking.uri, "s").rows
    assert (only.trial, only.default, only.gain) == (0, 0.9, 0)


def test_the_objectives_of_the_study_are_the_costs(compare_again):
    found = compare_again(also="adapter_bytes seconds")
    assert found.costs == ("adapter_bytes", "seconds")
    # all cost the same: the better of each draw is alone on the front
    assert sum(r.judged.front for r in found.rows if r.judged) == pytest.approx(1, abs=0.3)
    assert row(found, "alike").judged.front < 0.5


def test_smaller_may_be_better(compare_again):
    found = compare_again(goal="minimize")
    assert [r.label for r in found.rows if r.judged] == ["bad", "alike", "good"]
    assert row(found, "bad").judged.best


# -------------------------------------------------------------------- splits


def test_the_test_split_is_taken_once_it_was_read(compare_again):
    reading = [{"time": "2026-11-22T05:00:00", "trials": [17, 18], "reason": "", "ended": True}]
    found = compare_again(None, test_readings=json.dumps(reading))
    assert found.split == "test"
    assert row(found, "good").value == pytest.approx(0.82)
    assert row(found, "good").gain == pytest.approx(0.1)  # still on validation
    assert np.isnan(row(found, "lost").value)
    notes = " ".join(found.notes)
    assert "which the search has never read" in notes
    assert "read once (2026-11-22T05:00:00, 2 trials)" in notes
    assert "Not trained again, and so not measured on the test split: lost (lora) (trial 12)" in notes
    assert compare_again("validation").split == "validation"


def test_every_reading_is_named(compare_again):
    readings = [
        {"time": "2026-11-22", "trials": [17], "reason": ""},
        {"time": "2026-11-23", "trials": [17, 18], "reason": "a bug", "ended": False},
    ]
    notes = " ".join(compare_again(None, test_readings=json.dumps(readings)).notes)
    assert "read 2 times (2026-11-22, 1 trial; 2026-11-23, 2 trials, because: a bug, cut off)" in notes


def test_single_runs_that_were_promoted(tracking, tmp_path):
    study = open_study(tracking)
    for number, (label, share) in enumerate((("good", 0.9), ("bad", 0.5))):
        trial(study, 2 * number, label, share - 0.1)
        run = trial(study, 2 * number + 1, label, share)
        write_predictions(tmp_path / label / "test.parquet", right(share, number))
        run.artifacts(tmp_path / label, "predictions")
        run.summary({"test.accuracy": share})
    found = compare(tracking.uri, "s")
    assert found.split == "test"
    assert [(r.label, r.trial, r.kind, r.runs, r.judged.tied) for r in found.rows] == [
        ("good", 1, "one run", 1, True),
        ("bad", 3, "one run", 1, False),
    ]
    assert found.rows[0].judged.estimate == stats.estimate(Scores(right(0.9, 0)[None], [(0, 0)]))
    notes = " ".join(found.notes)
    assert "intervals and ties know nothing of seeds" in notes
    assert "Intervals are of 95 %, for new examples, not for new seeds." in notes
    assert "trained again, on" not in notes
    assert [r.judged for r in compare(tracking.uri, "s", "validation").rows] == [None, None]


def test_a_test_split_that_was_not_read(tracking, tmp_path):
    finalist(open_study(tracking), tmp_path, 0, 7, (0, 0), right(0.8, 0))
    notes = " ".join(compare(tracking.uri, "s").notes)
    assert "`workbench promote s` reads the test split once" in notes
    assert "The test split was never read." in notes
    with pytest.raises(StorageError, match="workbench promote s"):
        compare(tracking.uri, "s", "test")


def test_one_promoted_finalist_is_not_all(tracking, tmp_path):
    study = open_study(tracking)
    for number, test in ((0, right(0.8, 0)), (1, None)):
        finalist(study, tmp_path, number, number, (0, 0), right(0.8, number), test=test)
    assert compare(tracking.uri, "s").split == "validation"


def test_a_study_without_a_test_split(tracking):
    trial(open_study(tracking, test_rows="0"), 0, value=0.5)
    notes = " ".join(compare(tracking.uri, "s").notes)
    assert "The study has no test split." in notes
    assert "promote" not in notes


# -------------------------------------------------------------------- what is missing


def test_a_study_without_finalists(tracking):
    study = open_study(tracking)
    trial(study, 0, "lora", 0.7)
    trial(study, 1, "lora", 0.8)
    trial(study, 2, "ia3", 0.75)
    trial(study, 3, "ia3", outcome="running")
    found = compare(tracking.uri, "s")
    assert [(r.label, r.trial, r.kind, r.judged) for r in found.rows] == [
        ("lora", 1, "one run", None),
        ("ia3", 2, "one run", None),
    ]
    notes = " ".join(found.notes)
    assert "`finalists: {per_method: 1}`" in notes
    assert "All values are of one run, chosen by this split." in notes


def test_a_study_without_anything(tracking):
    open_study(tracking)
    found = compare(tracking.uri, "s")
    assert found.rows == []
    for made in (formats.markdown(found), formats.latex(found), in_terminal(found)):
        assert "accuracy" in made


def test_one_run_says_nothing_of_seeds(tracking, tmp_path):
    study = open_study(tracking)
    finalist(study, tmp_path, 0, 7, (0, 0), right(0.8, 0))
    found = compare(tracking.uri, "s")
    assert not found.rows[0].judged.estimate.seeds_known
    assert "for new examples, not for new seeds" in " ".join(found.notes)


def test_runs_that_failed_are_named(tracking, tmp_path):
    study = open_study(tracking)
    for number, seeds in enumerate(SEEDS[:4]):
        finalist(study, tmp_path, number, 7, seeds, right(0.8, number))
    trial(study, 4, outcome="crashed", message="killed", role="finalist", finalist_of=7, init_seed=13, order_seed=21)
    found = compare(tracking.uri, "s")
    assert (found.rows[0].runs, found.rows[0].failed) == (4, 1)
    assert "on 3 seeds of initialisation and 2 seeds of order; 1 of these runs did not finish." in " ".join(found.notes)


def test_other_examples_are_refused(tracking, tmp_path):
    study = open_study(tracking)
    finalist(study, tmp_path, 0, 7, (0, 0), right(0.8, 0))
    finalist(study, tmp_path, 1, 7, (1, 0), right(0.8, 1), actual=["neg"] * EXAMPLES)
    with pytest.raises(DataError, match="Trial 1 was measured on other examples"):
        compare(tracking.uri, "s")


def test_damaged_predictions_are_refused(tracking, tmp_path):
    study = open_study(tracking)
    run = trial(study, 0, role="finalist", finalist_of=7, init_seed=0, order_seed=0, value=0.5)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "validation.parquet").write_text("no table")
    run.artifacts(tmp_path / "p", "predictions")
    with pytest.raises(DataError, match="predictions of trial 0 cannot be read"):
        compare(tracking.uri, "s")


def test_predictions_that_are_not_there(tracking):
    trial(open_study(tracking), 0, role="finalist", finalist_of=7, init_seed=0, order_seed=0, value=0.5)
    with pytest.raises(StorageError):
        compare(tracking.uri, "s")


def test_a_metric_that_is_no_number_is_refused(tracking, tmp_path):
    finalist(open_study(tracking), tmp_path, 0, 7, (0, 0), np.append(right(0.8, 0), np.nan))
    with pytest.raises(DataError, match=r"Trial 7, validation split: .*finite"):
        compare(tracking.uri, "s")


# -------------------------------------------------------------------- notes


def test_budgets_are_stated(finished):
    (note,) = [note for note in finished.notes if "budget" in note]
    assert note.startswith("Methods shared one budget and did not get equal parts of it: ")
    assert "good 4 trials, 120 steps, 10 s" in note
    assert "lost 5 trials, 60 steps, 12 s" in note


def test_equal_budgets(tracking):
    study = open_study(tracking)
    for number, label in enumerate(("lora", "ia3")):
        trial(study, number, label, 0.5)
    # neither of these is paid for by the budget
    trial(study, 2, outcome="duplicate")
    trial(study, 3, value=0.6, resumes="0")
    notes = " ".join(compare(tracking.uri, "s").notes)
    assert "Methods had equal budgets: ia3 1 trial, 30 steps, 2 s; lora 1 trial, 30 steps, 2 s." in notes


def test_stated_budgets(tracking):
    trial(open_study(tracking, per_method=json.dumps({"trials": 8, "seconds": 60.5})), 0, value=0.5)
    notes = " ".join(compare(tracking.uri, "s").notes)
    assert "Equal budgets were stated, 8 trials or 60.5 seconds for each method" in notes


def test_failures_are_counted_by_reason(finished):
    assert finished.notes[-1] == (
        "3 of 35 trials failed: 2 diverged (the loss is nan); 1 out of memory (too large | by far) (besides, 1 pruned)."
    )


def test_no_failures_no_note(tracking):
    trial(open_study(tracking), 0, value=0.5)
    assert not any("failed" in note for note in compare(tracking.uri, "s").notes)


def test_the_tie_test_is_described(finished):
    (note,) = [note for note in finished.notes if note.startswith("†")]
    assert "paired by example, seeds included, Holm's correction for all 3 pairs" in note
    assert note.endswith(
        "in at most 5 % of studies, or more often if order, with two seeds, is by far the largest noise."
    )


def test_seeds_that_did_not_vary_are_named(tracking, tmp_path):
    study = open_study(tracking)
    for number, seeds in enumerate([(0, 7), (1, 7), (2, 7)] * 2):
        finalist(study, tmp_path, number, number // 3, seeds, right(0.8, number))
    notes = " ".join(compare(tracking.uri, "s").notes)
    assert "on 3 seeds of initialisation and 1 seed of order." in notes
    assert "for new examples and new seeds of initialisation." in notes
    assert "in at most 5 % of studies, as far as new examples go, not new seeds of order." in notes


def test_a_reference_stands_beside(tracking):
    study = open_study(tracking, "peft", reference="peft method_comparison, MetaMathQA")
    for number, value in enumerate((0.5, 0.6)):
        run = trial(study, number, f"lora-{number}", value)
        run.summary({"test.accuracy": value + 0.01})
    found = compare(tracking.uri, "peft")
    assert [(r.label, r.value, r.kind) for r in found.rows] == [
        ("lora-1", 0.61, "reference"),
        ("lora-0", 0.51, "reference"),
    ]
    assert found.notes == [
        "Imported from peft method_comparison, MetaMathQA: as published, one run each, so without intervals."
    ]


# -------------------------------------------------------------------- formats


def test_for_a_terminal(finished):
    text = in_terminal(finished)
    assert "s: validation accuracy (higher is better)" in text
    good = next(line for line in text.splitlines() if "good" in line)
    cells = re.split(r"  +|(?<=\d) (?=[\d\[])", good.strip())
    low, high = (f"{end:.4f}" for end in (stats.estimate(scores(17)).low, stats.estimate(scores(17)).high))
    assert cells[:5] == ["good (lora)", "1", "0.8400", f"[{low}, {high}]", "6"]
    assert "0.8300†" in text
    assert "0.6000†" not in text


def test_for_github(finished):
    lines = formats.markdown(finished).splitlines()
    assert lines[0] == "**s: validation accuracy (higher is better)**"
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert [row[0].strip() for row in cells] == [
        "method",
        "---",
        "**good (lora)**",
        "alike (lora)",
        "bad (lora)",
        "lost (lora)",
    ]
    assert r"too large \| by far" in lines[-1]
    assert "learning\\_rate=0.001" in cells[3][-1]
    assert any("`workbench promote s`" in line for line in lines)


def test_for_a_paper(finished):
    text = formats.latex(finished)
    assert r"\textbf{good (lora)} & \textbf{0.8400}" in text
    assert r"0.8300$^{\dagger}$" in text
    assert r"95 \% interval" in text
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    places = re.search(r"\\begin{tabular}{([lr]+)}", text)[1]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(places) - 1}
    assert not re.search(r"(?<!\\)[%#_](?! needs)", text.replace(r"\%", ""))


@pytest.mark.parametrize("character", list("&%$#_{}~^\\<>"))
def test_latex_is_escaped(tracking, character):
    trial(open_study(tracking), 0, f"a{character}b", 0.5)
    found = compare(tracking.uri, "s")
    assert f"a{character}b" not in formats.latex(found)
    assert f"a{formats.LATEX[character]}b" in formats.latex(found)


def test_for_a_program(finished, tracking):
    open_study(tracking, "other")
    rows = list(csv.DictReader(io.StringIO(formats.comma_separated([finished, compare(tracking.uri, "other")]))))
    assert [row["method"] for row in rows] == ["good", "alike", "bad", "lost"]
    found = stats.estimate(scores(17))
    assert float(rows[0]["low"]) == found.low  # every digit
    assert float(rows[0]["sd_initialisation"]) == found.sd_initialisation
    assert (rows[0]["study"], rows[0]["split"], rows[0]["best"], rows[1]["tied_with_best"]) == (
        "s",
        "validation",
        "True",
        "True",
    )
    assert float(rows[2]["p_holm"]) == row(finished, "bad").judged.behind.p
    assert (rows[3]["low"], rows[3]["kind"], rows[3]["default"]) == ("", "one run", "")


def test_columns_without_anything_are_left_out(tracking):
    trial(open_study(tracking), 0, value=0.5)
    found = compare(tracking.uri, "s")
    headings = [heading for heading, _ in formats.columns(found)]
    assert headings == [
        "method",
        "trial",
        "accuracy",
        "runs",
        "trainable",
        "KiB",
        "tensors' peak, MiB",
        "seconds",
        "hyperparameters",
    ]


# -------------------------------------------------------------------- the command


def test_the_command(home):
    shown = workbench("compare", "s", "--home", home, "--split", "validation")
    assert (shown.code, shown.err) == (0, "")
    assert "s: validation accuracy (higher is better)" in shown.out
    assert "3 of 35 trials failed" in " ".join(shown.out.split())
    written = workbench("compare", "s", "s", "--home", home, "--format", "markdown")
    assert written.out.count("**s: test accuracy (higher is better)**") == 2
    assert workbench("compare", "s", "--home", home, "--format", "latex").out.startswith("% needs")


def test_the_command_keeps_notes_out_of_csv(home):
    done = workbench("compare", "s", "s", "--home", home, "--format", "csv")
    assert [row["study"] for row in csv.DictReader(io.StringIO(done.out))] == ["s"] * 8
    assert done.err.splitlines()[0].startswith("s: Values are of the test split")


def test_the_command_names_a_study_that_is_not_there(home):
    done = workbench("compare", "absent", "--home", home)
    assert (done.code, done.out) == (2, "")
    assert "holds no study 'absent'" in done.err

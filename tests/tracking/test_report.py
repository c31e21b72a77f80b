from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from command import workbench
from made_up import STUDY, finalist, finished_study, open_study, right, trial

from workbench.tracking import figures
from workbench.tracking.comparison import compare
from workbench.tracking.report import report
from workbench.tracking.runs import default_store, open_tracking

EMPTY = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(scope="module")
def home(template, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    shutil.copy(template, home / "mlflow.db")
    finished_study(open_tracking(*default_store(home)), home / "predictions")
    return home


@pytest.fixture(scope="module")
def page(home):
    return report(default_store(home)[0], "s")


class Page(HTMLParser):
    """What a page is made of. A tag that is closed in the wrong place is a fault."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.rows, self.cell = [], [], [], [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = None

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def test_the_page_is_well_formed(page):
    found = Page(page)
    assert len(set(found.ids)) == len(found.ids)
    links = [attributes["href"][1:] for tag, attributes in found.tags if tag == "a"]
    assert len(links) == 10
    assert set(links) <= set(found.ids)


def test_the_page_needs_nothing_else(page):
    tags = {tag for tag, _ in Page(page).tags}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"""(src|href|xlink:href)=["'](?!#)""", page)
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_the_tables_hold_the_numbers(page, home):
    rows = Page(page).rows
    found = compare(default_store(home)[0], "s")
    good = next(row for row in rows if row[0] == "good (lora)")
    estimate = found.rows[0].judged.estimate
    assert good[2:5] == ["0.8400", f"[{estimate.low:.4f}, {estimate.high:.4f}]", "6"]
    behind = found.rows[2].judged.behind
    bad = next(row for row in rows if row[0] == "bad (lora)" and row[-1] == "no")
    assert bad[1].startswith("-0.2400 [")
    assert bad[2:4] == ["< 0.001", f"[{behind.bootstrap.low:+.4f}, {behind.bootstrap.high:+.4f}]"]
    assert ["lost", "5", "2 diverged, 1 complete, 1 pruned, 1 out of memory", "60", "12"] in rows
    assert ["diverged", "the loss is nan", "2"] in rows
    assert ["python", "3.11.7"] in rows
    for note in found.notes:
        assert note.split("`")[0].split("'")[0] in page


def test_what_comes_from_files_is_escaped(tracking, tmp_path):
    evil = "</td><script>alert('$x_1$')</script>"
    study = open_study(tracking, **{"env.gpu": evil})
    for number, label in enumerate((evil, "_hidden $ from legends")):
        trial(study, 3 * number, label, 0.5, role="default")
        trial(study, 3 * number + 1, label, 0.6, rate=1e-2)
        trial(study, 3 * number + 2, label, outcome="crashed", message=evil)
    finalist(study, tmp_path, 6, 1, (0, 0), right(0.6, 0), evil)
    finalist(study, tmp_path, 7, 1, (1, 0), right(0.6, 1), evil)
    page = report(tracking.uri, "s")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10
    assert "&lt;/td&gt;&lt;script&gt;alert(" in page
    assert STUDY.splitlines()[0].replace("<", "&lt;").replace(">", "&gt;") in page
    assert page.count("_hidden $ from legends") > 5
    Page(page)


def test_every_figure_is_there_and_says_what_it_shows(home):
    found = compare(default_store(home)[0], "s")
    drawn = figures.pictures(found)
    assert [picture.title for picture in drawn] == [
        "Intervals",
        "What it costs",
        "Expected best against budget",
        "Tuned against default",
        "Sensitivity to the learning rate",
        "Spread by source",
    ]
    for picture in drawn:
        svg = ElementTree.fromstring(picture.svg)
        words = " ".join(svg.itertext())
        assert "accuracy" in words or "learning rate" in words
        assert "\\math" not in words
        assert "currentColor" in picture.svg
        assert figures.INK not in picture.svg
        assert figures.FAINT not in picture.svg
        assert picture.caption
    intervals, costs, budget, tuning, rates, spread = (picture.alt for picture in drawn)
    assert "good (lora) 0.8400 (" in intervals
    assert "alike (lora) 0.8300 (" in intervals
    assert "tied with the best" in intervals
    assert "accuracy against trainable parameters: good (lora), alike (lora) on the Pareto front." in costs
    # of 0.74, 0.84, 0.79 and 0.64 one is 0.7525 on average; of lost one complete, one pruned, three failures
    assert "good 0.7525 after one trial, 0.8400 after 4" in budget
    assert "lost 0.3000 after one trial, 0.7000 after 5" in budget
    assert "good (lora) from 0.7400 to 0.8400" in tuning
    assert "good: best at a learning rate of 0.01, within 1 % from 0.01 to 0.01 (0.0 decades)." in rates
    assert "over initialisations" in spread


def test_pictures_are_the_same_each_time(home):
    found = compare(default_store(home)[0], "s")
    assert figures.pictures(found) == figures.pictures(found)


def test_ids_in_pictures_are_their_own(page):
    ids = set(Page(page).ids)
    used = re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', page)
    assert used
    assert set(used) <= ids


def test_looks_are_told_apart():
    looks = figures.Looks(map(str, range(42)))
    assert len({tuple(looks(str(i)).values()) for i in range(42)}) == 42


def test_a_study_without_anything(tracking):
    open_study(tracking)
    page = report(tracking.uri, "s")
    assert "No trial is complete." in page
    assert "<svg" not in page
    Page(page)


def test_a_study_of_failures_alone(tracking):
    trial(open_study(tracking), 0, outcome="diverged", message="nan")
    page = report(tracking.uri, "s")
    assert ["diverged", "nan", "1"] in Page(page).rows


def test_a_reference(tracking):
    study = tracking.open_study(
        "peft", {}, {"workbench.reference": "peft", "workbench.metric": "accuracy", "workbench.goal": "maximize"}, {}
    )
    trial(study, 0, value=0.4).summary({"test.accuracy": 0.5})
    page = report(tracking.uri, "peft")
    assert "Imported from peft." in page
    assert "The study file" not in page
    assert page.count("<svg") == 2


def test_the_command(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = workbench("report", "s", "--home", home)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("s.html: ")
    assert (tmp_path / "s.html").read_text().startswith("<!doctype html>")
    workbench("report", "s", "--home", home, "--output", tmp_path / "other.html")
    assert (tmp_path / "other.html").read_text() == (tmp_path / "s.html").read_text()
    refused = workbench("report", "s", "--home", home, "--output", tmp_path / "absent" / "x.html")
    assert refused.code == 2
    assert "cannot be written: No such file" in refused.err

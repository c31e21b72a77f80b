"""What only a browser shows: live refresh, selections, links, and errors in its console."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from urllib.parse import parse_qs, urlsplit

import pytest
from filled import TAGS, served, write_trial

from dashboards.address import link
from dashboards.shell import PAGES
from workbench.tracking.runs import default_store, open_tracking

pytestmark = pytest.mark.slow
PATIENCE = 60_000  # ms, on a busy machine
PROBES = re.compile(r"/_stcore/(health|host-config)$")  # Streamlit asks for them below the page first, then at the root


@pytest.fixture(scope="module")
def place(empty_store, tmp_path_factory, browser):
    """A server, and the open study "live" of its store, beside "done" with eight trials."""
    home = tmp_path_factory.mktemp("served")
    shutil.copy(empty_store.removeprefix("sqlite:///"), home / "mlflow.db")
    tracking = open_tracking(*default_store(home))
    done = tracking.open_study("done", {}, TAGS, {})
    for number in range(8):
        label = ("lora", "ia3")[number % 2]
        write_trial(done, number, label, "complete", 1000 * 2**number, 0.5 + number / 20, {"learning_rate": 1e-3})
    done.end("FINISHED")
    live = tracking.open_study("live", {}, TAGS, {})
    write_trial(live, 0, "lora", "complete", 24_000, 0.7, {"learning_rate": 1e-3})
    with served(tracking.uri) as url:
        yield url, live


class Tab:
    """A tab of a browser with nothing in common with the others."""

    def __init__(self, browser, url):
        self.url, self.errors = url, []
        self._context = browser.new_context(viewport={"width": 1400, "height": 1800})
        self.page = self._context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._heard)

    def _heard(self, message):
        if message.type == "error" and not PROBES.search(message.location["url"]):
            self.errors.append(f"{message.text} {message.location['url']}")

    def open(self, path):
        self.page.goto(path if path.startswith("http") else f"{self.url}/{path}")
        return self.rest()

    def rest(self):
        """Wait until nothing is computed or drawn."""
        self.page.wait_for_selector("[data-testid=stApp][data-test-connection-state=CONNECTED]")
        self.page.wait_for_selector("[data-testid=stHeading]")
        quiet = """() => {
            const app = document.querySelector('[data-testid=stApp]');
            const busy = app.dataset.testScriptState === 'running'
                || document.querySelector('[data-testid=stSpinner], [data-stale=true], [data-testid=stSkeleton]');
            window.quiet = busy ? 0 : (window.quiet || 0) + 1;
            return window.quiet > 4;
        }"""
        self.page.wait_for_function(quiet, polling=100)
        self.page.evaluate("window.quiet = 0")
        return self

    def asked(self, key):
        """A key of the address."""
        return parse_qs(urlsplit(self.page.url).query).get(key, [])

    def wait_for_address(self, pattern):
        self.page.wait_for_function("pattern => new RegExp(pattern).test(location.href)", arg=pattern)
        self.rest()

    def table(self, name):
        return self.page.locator("[data-testid=stDataFrame]").filter(has=self.page.get_by_label(name)).last

    def tick(self, row):
        """Tick a row of the last table, whose cells are pixels."""
        box = self.page.locator("[data-testid=stDataFrame]").last.bounding_box()
        self.page.mouse.click(box["x"] + 18, box["y"] + 35 * (row + 1) + 17)

    def opacities(self):
        """Of the chart's points, the sizes of their drawings beside."""
        points = self.page.locator("[data-testid=stVegaLiteChart]").last.locator("path[aria-roledescription=point]")
        return points.evaluate_all("all => all.map(each => Number(each.getAttribute('opacity') || 1))")

    def close(self):
        self._context.close()


@pytest.fixture
def tab(browser, place):
    opened = []

    def make():
        opened.append(Tab(browser, place[0]))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.parametrize("study", ["done", "live"])
def test_no_page_has_an_error(tab, study):
    known = [name for name in PAGES if find_spec(f"dashboards.{name}")]
    assert {"studies", "compare"} <= set(known)
    one = tab()
    for name in known:
        one.open(link(name, study=study))
        assert one.page.locator("[data-testid=stException]").count() == 0, name
    assert one.errors == []


def test_new_trials_appear_while_a_study_runs(tab, place):
    one, overall = tab().open("compare?study=live"), tab().open("?study=live")
    complete = one.page.get_by_test_id("stMetric").filter(has_text="Complete").get_by_test_id("stMetricValue")
    before = int(complete.inner_text())
    running = write_trial(place[1], 1, "ia3", "running", 4_600, None, {"learning_rate": 1e-2})
    one.page.get_by_test_id("stMetric").filter(has_text="Running").get_by_text("1", exact=True).wait_for()
    running.log(100, {"validation.accuracy": 0.9})
    running.end("complete")
    one.page.get_by_test_id("stMetric").filter(has_text="Best").get_by_text("0.9000").wait_for()
    assert int(complete.inner_text()) == before + 1
    place[1].end("FINISHED")
    finished = overall.page.locator("td[role=gridcell]").get_by_text("finished", exact=True)
    finished.nth(1).wait_for(state="attached")
    assert one.errors == overall.errors == []


def test_a_drag_in_the_chart_ticks_rows_of_the_table(tab):
    one = tab().open("compare?study=done")
    points = one.page.locator("[data-testid=stVegaLiteChart]").last.locator("path[aria-roledescription=point]")
    places = [points.nth(i).bounding_box() for i in range(points.count())]
    assert len(places) == 8
    two = sorted(places, key=lambda box: box["y"])[:2]  # the best
    one.page.mouse.move(two[1]["x"] - 12, two[0]["y"] - 12)
    one.page.mouse.down()
    one.page.mouse.move(two[0]["x"] + 10, two[1]["y"] + 10, steps=5)
    one.page.mouse.move(two[0]["x"] + 24, two[1]["y"] + 24, steps=5)
    one.page.mouse.up()
    one.wait_for_address("sel=")
    assert set(one.asked("sel")[0].split(",")) == {"6", "7"}
    one.page.locator("tr[role=row][aria-selected=true]").nth(1).wait_for(state="attached")
    assert one.page.locator("tr[role=row][aria-selected=true]").count() == 2
    assert sorted(one.opacities())[-3:] == [0.22, 1, 1]
    assert one.errors == []


def test_a_row_that_is_ticked_stands_out_in_the_chart_and_can_be_let_go(tab):
    one = tab().open("compare?study=done")
    one.tick(0)
    one.wait_for_address("sel=7")
    assert sorted(one.opacities())[-2:] == [0.22, 1]
    one.tick(2)
    one.wait_for_address("sel=7%2C5")
    one.page.get_by_text("Trial 7 beside 5").wait_for()
    one.page.get_by_text("Clear the selection of 2").click()
    one.page.wait_for_function("!location.href.includes('sel=')")
    one.rest()
    assert one.page.locator("tr[role=row][aria-selected=true]").count() == 0
    assert one.errors == []


def test_a_copied_address_opens_the_same_view(tab):
    one = tab().open("compare?study=done")
    one.page.get_by_test_id("stMultiSelect").filter(has_text="Methods").get_by_role("combobox").click()
    one.page.get_by_role("option", name="ia3").click()
    one.wait_for_address("method=ia3")
    one.page.keyboard.press("Escape")
    one.page.get_by_text("time", exact=True).click()
    one.wait_for_address("cost=time")
    one.tick(1)
    one.wait_for_address("sel=5")
    assert one.page.locator("[data-testid=stVegaLiteChart] path[aria-roledescription=point]").count() == 4
    other = tab().open(one.page.url)
    assert other.page.url == one.page.url
    assert other.page.locator("[data-testid=stVegaLiteChart] path[aria-roledescription=point]").count() == 4
    assert other.opacities() == one.opacities()
    assert other.page.locator("tr[role=row][aria-selected=true]").count() == 1
    assert one.errors == other.errors == []


def test_pages_keep_the_study_and_what_was_chosen_on_them(tab):
    one = tab().open("compare?study=done&sel=3")
    one.page.get_by_role("link", name="Studies").click()
    one.wait_for_address("studies|/\\?study=done|/$")
    one.wait_for_address("study=done")
    one.page.get_by_role("link", name="Compare").first.click()
    one.wait_for_address("compare.*study=done.*sel=3")
    assert one.errors == []

"""What the pages of one study share: its heading, the choice of the study, empty and error states, live refresh."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import streamlit as st

from workbench.errors import StorageError
from workbench.tracking import frames
from workbench.tracking.live import Snapshot
from workbench.tracking.runs import default_store

from . import address

REFRESH = "2s"
PAGES = ("studies", "compare", "hyperparameters", "trial", "registry")  # the first one is there when the app is opened
OPEN = "pages"  # key of the session: the pages by name
FIRST_STEP = "Type this in a terminal, then reload this page:\n\n```shell\nworkbench sweep studies/quickstart.yaml\n```"


@dataclass(frozen=True)
class Chosen:
    """The study that a page shows.

    Attributes:
        uri: tracking URI of the store.
        name: of the study.
        about: its row of `frames.studies`.
        trials: `frames.ranked`, best first.
        live: whether it runs.
        tags: of its run.
        version: of its trials that have ended: the same number, the same trials.
    """

    uri: str
    name: str
    about: pd.Series
    trials: pd.DataFrame
    live: bool
    tags: dict[str, str]
    version: int

    @property
    def metric(self) -> str:
        """The metric with the split that trials are measured on."""
        return f"{self.about['split']} {self.about['metric']}"


@st.cache_resource(show_spinner=False)
def snapshot(uri: str, study: str) -> Snapshot:
    """A study's trials, shared by all who look at it."""
    return Snapshot(uri, study)


def store() -> str:
    """Tracking URI of the store that the environment names."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_store(os.environ.get("WORKBENCH_HOME", "runs"))[0]


def on_study(title: str, body: Callable[[Chosen], None]) -> None:
    """Draw a page of one study: heading, choice of the study, and the body, every 2 s while the study runs."""
    uri = store()
    heading, choice = st.columns([3, 2], vertical_alignment="bottom")
    heading.header(title, anchor=False)
    studies = known_studies(uri)
    if studies is None:
        return
    names = studies["study"].tolist()
    address.hold(address.STUDY, names, names[0])
    name = choice.selectbox("Study", names, key=address.STUDY)
    if address.get(address.STUDY) not in ("", name):
        address.forget()
    address.put(address.STUDY, name)  # always, so that a copied link still means this study when there is a newer one
    live = bool((studies.loc[studies["study"] == name, "status"] == "RUNNING").any())
    st.fragment(_body, run_every=REFRESH if live else None)(uri, name, live, body)


def known_studies(uri: str) -> pd.DataFrame | None:
    """`frames.studies`; None, with what to type on the page, if there are none or the store cannot be read."""
    try:
        studies = frames.studies(uri)
    except StorageError as error:
        st.error(str(error), icon=":material/database_off:")
        st.markdown(FIRST_STEP)
        return None
    if studies.empty:
        st.info("No study has been run yet.", icon=":material/science:")
        st.markdown(FIRST_STEP)
        return None
    return studies


def chosen(uri: str, about: pd.Series) -> Chosen:
    """A study as it is now.

    Args:
        about: its row of `frames.studies`.

    Raises:
        StorageError: the store cannot be read.
    """
    known = snapshot(uri, about["study"])
    with nullcontext() if known.read else st.spinner(f"Reading the trials of {about['study']} ..."):
        seen = known.look()
    return Chosen(uri, about["study"], about, seen.ranked, about["status"] == "RUNNING", seen.tags, seen.version)


def go(page: str, **state: str | list[str]) -> None:
    """Go to another page of the app."""
    st.switch_page(st.session_state[OPEN][page], query_params={key: value for key, value in state.items() if value})


def page_link(page: str, label: str, icon: str | None = None, **state: str | list[str]) -> None:
    """Draw a link to another page of the app, in the same tab."""
    known = {key: value for key, value in state.items() if value}
    if page in st.session_state.get(OPEN, {}):
        st.page_link(st.session_state[OPEN][page], label=label, icon=icon, query_params=known)


def _body(uri: str, name: str, live: bool, body: Callable[[Chosen], None]) -> None:
    try:
        studies = frames.studies(uri).set_index("study", drop=False)
        if name not in studies.index:
            st.rerun()  # it was deleted
        now = chosen(uri, studies.loc[name])
    except StorageError as error:
        st.error(str(error), icon=":material/database_off:")
        return
    if live and not now.live:
        st.rerun()  # the whole page, which stops the timer
    if now.trials.empty:
        st.info("The first trial has not started yet.", icon=":material/hourglass_top:")
        return
    body(now)

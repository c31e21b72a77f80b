"""Entry point of `streamlit run`; each page is one module of this package with a function `page`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import streamlit as st

from dashboards import address, shell


def _page(name: str) -> Callable[[], None]:
    def draw() -> None:
        address.enter(name)
        import_module(f"dashboards.{name}").page()

    return draw


st.set_page_config(page_title="workbench", layout="wide")
st.html("<style>.stMainBlockContainer {padding-top: 4rem; padding-bottom: 3rem}</style>")  # less empty space
pages = {
    name: st.Page(_page(name), title=name.capitalize(), url_path=name, default=name == shell.PAGES[0])
    for name in shell.PAGES
    if find_spec(f"dashboards.{name}")
}
st.session_state[shell.OPEN] = pages
st.navigation(list(pages.values()), position="top").run()

"""Entry point of `streamlit run`; each page is one module of this package with a function `page`."""

from __future__ import annotations

import streamlit as st

from dashboards import overview

st.set_page_config(page_title="workbench", layout="wide")
st.navigation([st.Page(overview.page, title="Overview", url_path="overview", default=True)], position="hidden").run()

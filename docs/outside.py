"""A hook of mkdocs: pages may link to files of the repository that are not pages. The site does not have them, so it
says where they are; a link to one that does not exist is a warning, which `--strict` makes an error.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\.?/[^)#\s]+)(?:#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.plugins.outside")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replace links out of the folder of pages by the file's place in the repository."""
    pages = Path(config["docs_dir"])
    root = pages.parent

    def named(link: re.Match[str]) -> str:
        text, path = link.groups()
        file = Path(os.path.normpath(pages / Path(page.file.src_uri).parent / path))
        if file.is_relative_to(pages):
            return link[0]
        if not file.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        place = str(file.relative_to(root))
        return f"`{place}`" if text == place or text == file.name else f"{text} (`{place}`)"

    return LINK.sub(named, markdown)

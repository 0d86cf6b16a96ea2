"""Sections of the README in the documentation: what is written there once is not written again here.

In: a page with lines of the form `<!-- README: Results -->`. Out: the page with that section in the line's place.
Never: changes a file, reads anything but the README.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"


def section(title: str) -> str:
    """The text below the README's heading `## title`, up to the next heading; links into docs/ as from a page there.

    Raises:
        ValueError: the README has no such heading.
    """
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"the README has no section {title!r}")
    return found[1].strip().replace("](docs/", "](")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for every page before it is rendered."""
    return re.sub(r"^<!-- README: (.+) -->$", lambda line: section(line[1]), markdown, flags=re.MULTILINE)

"""Names that others chose, in Markdown: shown as they are, and never read as markup or HTML."""

from __future__ import annotations

import html
import re


def plain(text: str) -> str:
    """Text between other text, or in the cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "'")


def code(text: str) -> str:
    """A code span, which a grave accent or a line's end would close."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def yaml_block(text: str) -> str:
    """A block of YAML, whose fence is longer than any in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return f"{fence}yaml\n{text}{fence}"

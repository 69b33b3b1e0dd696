"""Code blocks of Markdown files, and what they say they print."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any


def blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def promised(block: str) -> list[str]:
    """What a block says it prints: its lines that are a comment from the first column on."""
    return [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]


def printed(block: str, names: dict[str, Any]) -> list[str]:
    """Run a block in the namespace ``names`` and give the lines that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block, names)
    return out.getvalue().splitlines()

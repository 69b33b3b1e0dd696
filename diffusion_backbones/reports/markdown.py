"""Markdown: templates, tables and lists, and how numbers are written in them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

HUB = "https://huggingface.co"
WEB = r"https?://[^\s<>\"]+"
PAGE = r"(?:\.\./)*[\w/-]+\.md"
"""What a link may lead to: the web, or a page beside the one that it is on."""


def render(template: str, **values: Any) -> str:
    """A template of the folder ``templates``, filled in.

    Raises:
        jinja2.UndefinedError: The template uses a value that is not given.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow to import, and only cards need it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=False,  # the output is Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"table": table, "bullets": bullets, "gflops": gflops, "millions": millions}
    environment.filters |= {"line": line, "code": code}
    return environment


def front_matter(metadata: Mapping[str, Any]) -> str:
    """YAML for the head of a card, as the Hugging Face hub reads it, in the order given."""
    from huggingface_hub import ModelCardData  # slow to import, and only cards need it

    return ModelCardData(**metadata).to_yaml(original_order=list(metadata))


def line(text: str) -> str:
    """A text on one line. Others may have written it, so HTML in it is shown and not read, links lead to the web or
    into this repository, and pictures are links: a page that shows one tells its host who reads it. What is shown is
    written as an entity, since a backslash before it would be taken for the end of another's.
    """
    text = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = text.replace("![", "&#33;[")
    return re.sub(rf"\](?=:|\((?!https?://|\.\./|{PAGE}\)))", "&#93;", text)


def code(text: str) -> str:
    """A text that stays within its block of code."""
    return re.sub(r"`{3,}|~{3,}", "", text)


def cell(text: str) -> str:
    """A text that stays within its cell of a table, whatever it contains."""
    return line(text).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells may contain any text."""
    lines = [map(cell, head), ["---"] * len(head), *(map(cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences."""
    return "\n".join(f"* {line(sentence)}" for sentence in sentences)


def link(text: str, address: str) -> str:
    """A link, or the text alone without an address of the web or of a page."""
    return f"[{text}]({address})" if re.fullmatch(f"{WEB}|{PAGE}", address) else text


def repository(name: str) -> str:
    """A link to a repository of the Hugging Face hub."""
    return link(name, f"{HUB}/{name}")


def plain(text: str) -> str:
    """A text without Markdown, for a terminal: no code marks, and x for the times sign."""
    return text.replace("`", "").replace("×", "x")


def number(value: float, digits: int) -> str:
    """``1,117.25``: a number with so many digits behind the point."""
    return f"{value:,.{digits}f}"


def millions(count: int) -> str:
    """``845 M``, or ``6.88 M`` below ten."""
    return f"{number(count / 1e6, 0 if count >= 1e7 else 2)} M"


def gflops(count: float) -> str:
    """``1,117``, or ``4.55`` below ten, of 1e9 operations."""
    return number(count, 0 if count >= 10 else 2)


def memory(count: int) -> str:
    """``3.52 GB``, or ``29.7 MB`` below a tenth of one, of bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

"""The publications that introduced the checkpoints and chose the recipes: ``papers["meng2024gdf"]``, from
``references.bib``.
"""

from __future__ import annotations

import re
from pathlib import Path

from diffusion_backbones.spec.checkpoint import Paper
from diffusion_backbones.spec.validation import closest

FILE = Path(__file__).with_name("references.bib")
_ENTRY = re.compile(r"@misc\{([^,\s]+),\n((?:  \w+ = \{.*\},?\n)+)\}\n")
_FIELD = re.compile(r"  (\w+) = \{(.*)\},?")
_FIELDS = dict.fromkeys(("title", "author", "year", "booktitle", "eprint", "archivePrefix", "url"))


class Papers(dict[str, Paper]):
    """BibTeX key -> publication; an unknown key is a ``KeyError`` with the closest."""

    def __missing__(self, key: str) -> Paper:
        raise KeyError(f"{FILE.name} has no entry {key!r}.{closest(key, self)}")


def read(text: str) -> Papers:
    """Inverse of :attr:`Paper.bibtex` for any number of entries: ``@misc``, with one field on a line. Lines that start
    with ``%`` are comments.

    Raises:
        ValueError: Anything else, or a key that appears twice.
    """
    text = re.sub(r"^%.*\n", "", text, flags=re.MULTILINE)
    if rest := _ENTRY.sub("", text).strip():
        raise ValueError(f"expected @misc entries with one 'field = {{value}}' on a line, got {rest.splitlines()[0]!r}")
    found = Papers()
    for key, body in _ENTRY.findall(text):
        fields = dict(_FIELD.findall(body))
        if key in found or not {"title", "year"} <= fields.keys() <= _FIELDS.keys():
            raise ValueError(
                f"{key!r} must appear once, with title and year and nothing but {', '.join(_FIELDS)}; it has "
                f"{', '.join(fields)}"
            )
        found[key] = Paper(
            key=key,
            title=fields["title"],
            authors=fields.get("author", ""),
            venue=fields.get("booktitle", ""),
            year=int(fields["year"]),
            arxiv=fields.get("eprint", ""),
            url=fields.get("url", ""),
        )
    return found


papers = read(FILE.read_text(encoding="utf-8"))

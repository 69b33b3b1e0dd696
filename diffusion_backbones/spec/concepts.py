"""Concepts: words, the prompt that they stand in, and where in it they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Places = Mapping[str, Sequence[tuple[int, int]]]
"""Word -> the characters of a prompt that it is, begin and end, as often as it occurs."""

SLOT = "{}"
"""Where a template has its words."""


class Said(NamedTuple):
    """What a tokenizer is given for a prompt.

    Attributes:
        text: The prompt, with what a pipeline puts around it.
        dropped: How many tokens stand before those that the network is given.
    """

    text: str
    dropped: int = 0


def check_words(words: Any) -> list[str]:
    """The words of a call, one or several.

    Raises:
        TypeError: They are no strings.
        ValueError: There are none, one is empty, or one is there twice.
    """
    given = [words] if isinstance(words, str) else words
    if not isinstance(given, (list, tuple)) or not all(isinstance(word, str) for word in given):
        raise TypeError(f"concepts must be strings, such as ['cat', 'sky'], got {words!r:.80}")
    stripped = [word.strip() for word in given]
    if not stripped or not all(stripped):
        raise ValueError(f"concepts must be at least one word, and none empty, got {words!r:.80}")
    if twice := next((word for word in stripped if stripped.count(word) > 1), None):
        raise ValueError(f"the concept {twice!r} is there twice; each gives one map, so name it once")
    return stripped


def placed(words: Sequence[str], prompt: str | None) -> tuple[str, Places]:
    """The prompt that words are read in, and their places.

    Args:
        words: At least one.
        prompt: A text that they occur in, or a template that has them, joined by spaces, in place of its ``{}``; by
            default they are the prompt.

    Raises:
        TypeError: The prompt is no string.
        ValueError: A word does not occur in it, or it has several ``{}``.
    """
    text = around(words, prompt)
    if prompt is None or SLOT in prompt:
        return text, _in_a_row(words, (prompt or SLOT).strip().index(SLOT))
    places = {word: [match.span() for match in re.finditer(_alone(word), text, re.IGNORECASE)] for word in words}
    if absent := next((word for word in words if not places[word]), None):
        raise ValueError(
            f"the concept {absent!r} is not in prompt={text!r:.80}; put it there, or a {SLOT} that stands for all "
            "concepts"
        )
    return text, places


def around(words: Sequence[str], prompt: str | None) -> str:
    """The text of a prompt, with words, joined by spaces, where it has a ``{}``; without a prompt they are it.

    Raises:
        TypeError: The prompt is no string.
        ValueError: It has several ``{}``.
    """
    if not isinstance(prompt, str | None):
        raise TypeError(f"prompt must be one string, in which the concepts are, got {prompt!r:.80}")
    text = (SLOT if prompt is None else prompt).strip()
    return fill(text, " ".join(words)) if SLOT in text else text


def fill(template: str, label: str) -> str:
    """A template with a label in place of its ``{}``.

    Raises:
        ValueError: It has none, or several.
    """
    if template.count(SLOT) != 1:
        raise ValueError(f"prompt={template!r:.80} must have one {SLOT}, where the label goes")
    return template.replace(SLOT, label)


def check_filled(prompt: Any) -> None:
    """Raise ``ValueError`` if a prompt, or one of several, keeps a place for a label that nobody gives."""
    some = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, (list, tuple)) else []
    if open_ := next((text for text in some if isinstance(text, str) and SLOT in text), None):
        raise ValueError(f"prompt={open_!r:.80} has a place for a label; give labels= in the call, or a prompt without")


def filled(template: Any, labels: Any, images: int) -> list[str]:
    """The prompts of a batch: a template with the label of each image.

    Args:
        labels: A string for the batch, or one for each image.
        images: How many there are.

    Raises:
        TypeError: They are no strings, or the template is none.
        ValueError: They are of another number than the images, or the template has no one ``{}``.
    """
    if not isinstance(template, str):
        raise TypeError(f"with labels, prompt must be one string with a {SLOT}, got {template!r:.80}")
    some = [labels] if isinstance(labels, str) else labels
    if not isinstance(some, (list, tuple)) or not all(isinstance(label, str) for label in some):
        raise TypeError(f"labels must be a string or a list of strings, got {labels!r:.80}")
    if len(some) not in (1, images):
        raise ValueError(f"labels must be one string or {images}, one per image; got {len(some)}")
    return [fill(template, label) for label in some]


def check_classes(classes: Sequence[str], template: str, what: str) -> None:
    """Check that classes, if there are any, have names, and a template to stand in.

    Raises:
        ValueError: A name is empty or there twice, or the template has no one ``{}``.
    """
    if not classes:
        return
    if not all(name.strip() for name in classes):
        raise ValueError(f"{what}: classes must be names, and one is empty, got {classes!r:.80}")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"{what}: the class {twice!r} is there twice; each has one map, so name it once")
    if template.count(SLOT) != 1:
        raise ValueError(f"{what}: with classes, prompt must have one {SLOT} where they go, got {template!r:.80}")


def of_classes(template: Any, labels: Any, classes: Sequence[str], images: int) -> list[list[str]]:
    """The prompts of every class, for the batch or for each image.

    Args:
        template: Where the classes stand.
        labels: What a call gives in place of the classes: as many for the batch, or as many for each image; or None.
        classes: Of the recipe.
        images: How many there are.

    Raises:
        TypeError: They are no strings, or the template is none.
        ValueError: They are of another number, or the template has no one ``{}``.
    """
    if not isinstance(template, str):
        raise TypeError(f"with classes, prompt must be one string with a {SLOT}, got {template!r:.80}")
    some = classes if labels is None else labels
    rows = [some] if _are_names(some) else some
    if not isinstance(rows, (list, tuple)) or not all(map(_are_names, rows)):
        raise TypeError(
            f"labels must be {len(classes)} strings, or a list of as many for each image, got {labels!r:.80}"
        )
    if len(rows) not in (1, images) or any(len(row) != len(classes) for row in rows):
        sizes = " and ".join(str(len(row)) for row in rows)
        raise ValueError(
            f"labels must be {len(classes)} strings, one per class, or {images} lists of them, one per image; got "
            f"{sizes}"
        )
    return [[fill(template, name) for name in row] for row in rows]


def _are_names(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(name, str) for name in given)


def _in_a_row(words: Iterable[str], begin: int) -> Places:
    places = {}
    for word in words:
        places[word] = [(begin, begin + len(word))]
        begin += len(word) + 1
    return places


def _alone(word: str) -> str:
    """A pattern of the word that is no part of another."""
    return rf"(?<!\w){re.escape(word)}(?!\w)"

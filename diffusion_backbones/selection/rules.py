"""The filter: which activations are worth comparing, by rules that are data."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from diffusion_backbones.selection.properties import Properties
from diffusion_backbones.spec.validation import check_fields, closest

FILE = Path(__file__).with_name("rules.yaml")
MEASURED = tuple(f.name for f in fields(Properties) if f.type == "float")


@dataclass(frozen=True)
class Rule:
    """Drops activations.

    Args:
        name: What it is called in reports.
        ids: Shell-style patterns of what it is about.
        because: Why, for people.
        unless: Patterns of what it spares.
        above, below: Property -> threshold; an activation is dropped if one of its properties lies beyond. Without any,
            all of ``ids`` are.

    Raises:
        ValueError: No such property.
    """

    name: str
    ids: tuple[str, ...]
    because: str
    unless: tuple[str, ...] = ()
    above: Mapping[str, float] = field(default_factory=dict)
    below: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.above, *self.below):
            if name not in MEASURED:
                raise ValueError(
                    f"rule {self.name!r}: there is no property {name!r}.{closest(name, MEASURED)} There are: "
                    f"{', '.join(MEASURED)}."
                )

    def concerns(self, id: str) -> bool:
        """Whether it is about an activation."""
        return _matches(id, self.ids) and not _matches(id, self.unless)

    def reason(self, id: str, properties: Properties) -> str:
        """Why an activation is dropped, or "" if it is not."""
        if not self.concerns(id):
            return ""
        if not self.above and not self.below:
            return f"{self.name}: {self.because}"
        for name, threshold in (*self.above.items(), *self.below.items()):
            value = getattr(properties, name)
            if (name in self.above and value > threshold) or (name in self.below and value < threshold):
                return f"{self.name}: {name} is {value:.3g}, the threshold {threshold:g}; {self.because}"
        return ""


def _matches(id: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(id, pattern) for pattern in patterns)


def load(path: str | Path = FILE) -> list[Rule]:
    """Rules from a YAML file, the paper's by default.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no list of rules; the rule and the key are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file of rules; {FILE} is the one that is used by default, and a model for others"
        )
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise ValueError(f"{path} must hold a list of rules, each a mapping with at least name, ids and because")
    try:
        return [_rule(item) for item in data]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _rule(item: dict[str, Any]) -> Rule:
    check_fields(Rule, item, f"rule {item.get('name', '?')!r}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in item.items()}
    return Rule(**values)


def apply(rules: Sequence[Rule], properties: Mapping[str, Properties]) -> dict[str, str]:
    """Id -> why it is dropped, "" for those that are kept, in the order given."""
    return {id: next(filter(None, (rule.reason(id, found) for rule in rules)), "") for id, found in properties.items()}


def by_name(rules: Sequence[Rule], ids: Sequence[str]) -> dict[str, str]:
    """Like :func:`apply`, of what can be told before anything is measured: the rules without thresholds."""
    return {
        id: next((rule.name for rule in rules if not (rule.above or rule.below) and rule.concerns(id)), "")
        for id in ids
    }


def check(reasons: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if nothing is kept."""
    if all(reasons.values()):
        names = {reason.partition(":")[0] for reason in reasons.values()}
        raise ValueError(
            f"the rules drop all {len(reasons)} activations ({', '.join(sorted(names))}); raise a threshold, or give "
            "ids that they keep"
        )

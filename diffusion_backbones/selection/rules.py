"""The filter: rules, which are data, say which activations are worth comparing."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffusion_backbones.selection.properties import Properties
from diffusion_backbones.spec import strict_yaml
from diffusion_backbones.spec.validation import check_fields, closest

FILE = Path(__file__).with_name("rules.yaml")
MEASURED = tuple(f.name for f in fields(Properties) if f.type == "float")


@dataclass(frozen=True)
class Rule:
    """A rule that drops activations.

    Args:
        name: Its name in reports.
        ids: Shell-style patterns of the activations that it concerns.
        because: The reason, for people.
        unless: Patterns of the activations that it spares.
        above, below: Property -> threshold; an activation is dropped if one of its properties is beyond. Without a
            threshold all of ``ids`` are dropped.

    Raises:
        ValueError: A property is unknown.
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
                    f"rule {self.name!r}: unknown property {name!r}.{closest(name, MEASURED)} Known are: "
                    f"{', '.join(MEASURED)}."
                )

    def concerns(self, activation_id: str) -> bool:
        """Whether the rule concerns an activation."""
        return _matches(activation_id, self.ids) and not _matches(activation_id, self.unless)

    def reason(self, activation_id: str, properties: Properties) -> str:
        """Why an activation is dropped, or "" if it is not."""
        if not self.concerns(activation_id):
            return ""
        if not self.above and not self.below:
            return f"{self.name}: {self.because}"
        for name, threshold in (*self.above.items(), *self.below.items()):
            value = getattr(properties, name)
            if (name in self.above and value > threshold) or (name in self.below and value < threshold):
                return f"{self.name}: {name} is {value:.3g}, the threshold {threshold:g}; {self.because}"
        return ""


def _matches(activation_id: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(activation_id, pattern) for pattern in patterns)


def load(path: str | Path = FILE) -> list[Rule]:
    """Read rules from a YAML file, the paper's by default.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a list of rules; the error names the rule and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"the rules {path} do not exist or are not a file; {FILE} holds the default ones, and is a model for others"
        )
    try:
        data = strict_yaml.load(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
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
    """Id -> why it is dropped, or "" if it is kept, in the order given."""
    return {
        name: next(filter(None, (rule.reason(name, found) for rule in rules)), "") for name, found in properties.items()
    }


def by_name(rules: Sequence[Rule], ids: Sequence[str]) -> dict[str, str]:
    """Like :func:`apply`, but only by the rules without thresholds, which need no measured properties."""
    return {
        name: next((rule.name for rule in rules if not (rule.above or rule.below) and rule.concerns(name)), "")
        for name in ids
    }


def check_some_kept(reasons: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if the rules drop every activation."""
    if all(reasons.values()):
        names = {reason.partition(":")[0] for reason in reasons.values()}
        raise ValueError(
            f"the rules drop all {len(reasons)} activations ({', '.join(sorted(names))}); raise a threshold, or give "
            "ids that they keep"
        )

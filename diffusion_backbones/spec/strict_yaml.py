"""YAML that means what it looks like: no key twice, and no number in YAML 1.1's octal or sexagesimal notation."""

from __future__ import annotations

import functools
from typing import Any


def load(text: str, where: str) -> Any:
    """The plain data of a YAML or JSON text.

    Args:
        text: What a file holds.
        where: Names the file in errors.

    Raises:
        ValueError: It is not YAML, is nested too deeply, gives a key twice or writes a number in a notation that other
            readers take for another number.
    """
    import yaml  # slower to import than this package

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not a YAML or JSON file: {error}") from error
    except RecursionError:
        raise ValueError(f"{where} is not a YAML or JSON file: it is nested too deeply") from None
    except _AmbiguousError as error:
        raise ValueError(f"{where}, line {error}") from None


class _AmbiguousError(Exception):
    """What YAML allows and people misread."""


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if (key.tag, key.value) in seen if isinstance(key, yaml.ScalarNode) else False:
                    raise _AmbiguousError(f"{key.start_mark.line + 1}: {key.value!r} is given twice; keep one")
                seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

        def number(self, node: Any) -> int | float:
            digits = node.value.lstrip("+-")
            octal = len(digits) > 1 and digits[0] == "0" and digits[1:].isdigit()
            if octal or ":" in digits or "_" in digits:
                raise _AmbiguousError(
                    f"{node.start_mark.line + 1}: {node.value} is read as different numbers by different versions of "
                    "YAML; write it in decimal digits, without leading zeros, or in quotes if it is a text"
                )
            read: Any = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
            value: int | float = read(node)
            return value

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.number)
    return Loader

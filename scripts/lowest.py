"""Print the lowest versions that pyproject.toml promises, one ``name==version`` a line, for a file of pip's.

python scripts/lowest.py > lowest.txt && pip install --requirement lowest.txt
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(requirement: str) -> str:
    """``name>=1.2`` as ``name==1.2``.

    Raises:
        ValueError: The requirement has no lower bound, so nobody can say what it promises.
    """
    found = re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)(?:\s*,.*)?", requirement)
    if not found:
        raise ValueError(f"{requirement!r} in {PYPROJECT.name} needs a lower bound that was tested: name>=version")
    return f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    with PYPROJECT.open("rb") as file:
        print("\n".join(map(lowest, tomllib.load(file)["project"]["dependencies"])))

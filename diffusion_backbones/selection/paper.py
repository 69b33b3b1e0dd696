"""The tables of the paper, and the commands for them, for users who have the weights and the data."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("paper.yaml")
HEAD = """The tables of Meng et al. (GDF, https://arxiv.org/abs/2410.03558) and the commands for them. \
None was run with the published weights by this
package. Where a command compares activations its probe is a ridge regression on 400 places of each image, \
half of the images against the other half,
three times; the paper trains ten small networks on all pixels. So compare the order of the rows, not their height.

A folder of masks holds a .png of class numbers for every image, of the same name and size.
"""
DATA = {"horse_21": "a photo of a horse", "bedroom_28": "a photo of a bedroom"}
"""The data sets of Tables 4 to 6, one simple and one complex, from ddpm-segmentation (https://arxiv.org/abs/2112.03126),
and their prompts.
"""


def tables() -> list[dict[str, Any]]:
    """The tables of ``paper.yaml``: each with its name, what its command does, and either ``ids`` and ``checkpoints``
    or ``commands``.
    """
    found: list[dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def commands(table: dict[str, Any]) -> Iterator[str]:
    """The commands for a table."""
    if "ids" not in table:
        for command in table["commands"]:
            for name in table.get("checkpoints") or table["configs"]:
                yield command.format(checkpoint=name, config=name)
        return
    ids = " ".join(f"--ids {shlex.quote(pattern)}" for pattern in table["ids"])
    number = table["table"].split(",")[0].split()[-1]
    for checkpoint in table["checkpoints"]:
        for data, prompt in DATA.items():
            files = f"--images {data}/images --masks {data}/masks --prompt {shlex.quote(prompt)}"
            yield (
                f"diffusion-backbones select {checkpoint} {files} --everything {ids} -o "
                f"selection/table{number}_{checkpoint}_{data}"
            )


def text() -> str:
    """All tables and their commands, for the terminal."""
    parts = [HEAD]
    for table in tables():
        rows = f" ({table['rows']} rows)" if "rows" in table else ""
        does = [table["does"]] if "does" in table else []
        parts.append(
            "\n".join([f"{table['table']}{rows}", *does, "", *(f"    {command}" for command in commands(table)), ""])
        )
    return "\n".join(parts)

"""Write the figures of ``evaluate.py`` into a document, between ``<!-- photographs -->`` and ``<!-- /photographs -->``.

python scripts/tinysd/table.py build/tinysd/figures.csv docs/tinysd.md
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path

COLUMNS = 5
BETWEEN = re.compile(r"(?<=<!-- photographs -->\n).*(?=<!-- /photographs -->)", re.DOTALL)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown tables of at most COLUMNS metrics: features by metrics, each figure with its interval."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    cells = {(row["features"], row["metric"]): f"{row['value']} [{row['low']}, {row['high']}]" for row in rows}
    tables = []
    for start in range(0, len(metrics), COLUMNS):
        some = metrics[start : start + COLUMNS]
        lines = [["features", *some], ["---"] * (1 + len(some))]
        for name in dict.fromkeys(row["features"] for row in rows):
            lines.append([f"`{name}`", *(cells.get((name, metric), "") for metric in some)])
        tables.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("document", type=Path)
    args = parser.parse_args()
    written, places = BETWEEN.subn(
        lambda _: table(list(csv.DictReader(args.csv.open(newline="")))), args.document.read_text(encoding="utf-8")
    )
    if places != 1:
        raise SystemExit(
            f"{args.document} holds {places} times '<!-- photographs --> ... <!-- /photographs -->', expected one."
        )
    args.document.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()

"""What benches that go on where they stopped share: their finished cells, means over seeds, and the README's tables.

A cell is a line of JSON in bench/results, appended when it is done and skipped the next time. The README's tables are
made of these lines, between a comment that names the bench and `END`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
END = "<!-- end -->\n"
STUDENT = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""The 97.5 % point of Student's t for a mean of so many."""


def read(path: Path) -> list[dict[str, Any]]:
    """The finished cells; a line that was cut off is none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes().endswith(b"\n") or not path.stat().st_size
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(row) + "\n")


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds, and half the width of its 95 % interval (Student's t); None for fewer than three seeds, of
    which the spread says next to nothing."""
    if len(values) < 3:
        return fmean(values), None
    return fmean(values), STUDENT.get(len(values), 2.2) * stdev(values) / math.sqrt(len(values))


def said(values: Iterable[float], spec: str = ".3f", *, of: int | None = None) -> str:
    """The mean over seeds and its interval, and how many seeds they are of where it is not `of` of them.

    Args:
        spec: the mean's format; a sign in it is the mean's alone.
    """
    found = list(values)
    if not found:
        return ""
    mean, half = interval(found)
    seeds = f" ({len(found)})" if of is not None and len(found) != of else ""
    return f"{mean:{spec}}" + ("" if half is None else f" ± {half:{spec.lstrip('+')}}") + seeds


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


def in_readme(bench: str) -> tuple[str, str, str]:
    """The README before the table that this bench makes, the table, and the README behind it.

    Raises:
        ValueError: there is none.
    """
    head, start, rest = README.read_text().partition(f"<!-- made by bench.{bench} -->\n")
    table, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"{README} has no table that is made by bench.{bench}")
    return head + start, table, end + tail


def put_into_readme(bench: str, table: str) -> None:
    before, _, behind = in_readme(bench)
    README.write_text(before + table + behind)

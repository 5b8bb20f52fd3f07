"""What benches that go on where they stopped share: their finished cells, means over seeds, and the README's tables.

A cell is a line of JSON in bench/results, appended when it is done and skipped the next time. The README's tables are
made of these lines, between a comment that names the bench and `END`.
"""

import argparse
import fcntl
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from tempfile import mkdtemp
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
END = "<!-- end -->\n"
Row = dict[str, Any]
Cell = TypeVar("Cell")

STUDENT = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""The 97.5 % point of Student's t for a mean of so many."""


def read(path: Path) -> list[Row]:
    """The finished cells; a line that was cut off is none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append(path: Path, row: Row) -> None:
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


def svg(parts: Sequence[str], *, label: str, width: int, height: int) -> str:
    """A picture that follows the reader's light or dark. Its lines and dots are of class `first`, `second` or `third`,
    or `aside`; a line that is no curve is `grid`."""
    light, dark = ("#2563eb", "#d97706", "#059669"), ("#60a5fa", "#fbbf24", "#34d399")

    def colours(of: Sequence[str]) -> str:
        classes = zip(("first", "second", "third"), of, strict=True)
        return "".join(f".{name}{{stroke:{colour};fill:{colour}}}" for name, colour in classes)

    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif"'
        f' font-size="13" role="img" aria-label="{label}">'
    )
    style = (
        f"<style>text{{fill:#444}}.grid{{stroke:#ddd}}{colours(light)}.aside{{stroke:#777}}"
        f"@media (prefers-color-scheme:dark){{text{{fill:#bbb}}.grid{{stroke:#3a3a3a}}{colours(dark)}}}"
        "polyline{fill:none!important;stroke-width:2}.aside,.dashed{stroke-dasharray:4 4;stroke-width:1}</style>"
    )
    return "\n".join([head, style, *parts, "</svg>", ""])


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
    before, old, behind = in_readme(bench)
    if old == table:
        return
    new = README.with_name(f".{README.name}.{os.getpid()}")
    new.write_text(before + table + behind)
    new.replace(README)  # whole or not at all, whenever the bench is stopped


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold these results for this process: two would do the same cells, and a mean would count them twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"Another process adds cells to {path}: wait for it, or work in a checkout of its own.")
        yield


def commit() -> str:
    """Of the code that makes a row, with a + where that differs from it."""
    try:
        run = partial(subprocess.run, cwd=README.parent, capture_output=True, text=True, check=True)
        head = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--", "bench/*.py", "data", "trainer"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def share(text: str) -> float:
    """An option's value from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def not_negative(text: str) -> int:
    """An option's value from 0 on."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def amount(text: str) -> float:
    """An option's value from 0 on, which may be infinite."""
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A bench's finished cells, and what is made of them."""

    bench: str
    seeds: Sequence[int]
    table: Callable[[list[Row]], Table]
    markdown: Callable[[list[Row]], str]
    """The README's table."""
    summary: Callable[[list[Row]], dict[str, Any]]
    """The figures of `--json`."""
    draw: Callable[[list[Row]], object] = lambda rows: None
    """Writes the picture that the README shows beside the table."""
    width: int = 132
    """Characters below which the table would lose columns."""

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.bench}.jsonl"

    def parser(self, doc: str | None, *, quick: str) -> argparse.ArgumentParser:
        """The options of every such bench.

        Args:
            quick: what is done of it, in words.
        """
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help=f"{quick}; kept only where --results says")
        seeds = f"{self.seeds[0]} to {self.seeds[-1]}"
        parser.add_argument("--seed", type=int, action="append", help=f"make only these seeds' cells (default {seeds})")
        parser.add_argument("--cells", type=not_negative, default=10**9, help="at most so many new cells; 0: only show")
        parser.add_argument("--minutes", type=amount, default=math.inf, help="begin no cell after so many")
        parser.add_argument("--results", type=Path, help="of the finished cells (default under bench/results)")
        parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
        return parser

    def seeds_for(self, arguments: argparse.Namespace) -> Sequence[int]:
        """Those that were asked for; by default all, and one where it is to be quick."""
        return arguments.seed or self.seeds[: 1 if arguments.quick else None]

    def go_on(
        self,
        arguments: argparse.Namespace,
        wanted: Sequence[Cell],
        run: Callable[[Cell, list[Row]], Row],
        is_done: Callable[[Cell, Row], bool],
    ) -> None:
        """Do the cells that are missing, and show all. Where these are the project's own results, the README follows
        each of them.

        Args:
            run: makes a cell's row, given the rows that there are.
            is_done: whether it has this row already.
        """
        path = (arguments.results or (Path(mkdtemp()) / "quick.jsonl" if arguments.quick else self.path)).resolve()
        if path.is_dir():
            sys.exit(f"{path} is a folder: --results is a file.")
        if arguments.quick and path == self.path:
            sys.exit(f"{path} is of full cells: keep quick ones in another file.")

        def alike() -> list[Row]:
            return [row for row in read(path) if row.get("quick", False) == arguments.quick]

        console = Console()
        console.width = max(console.width, self.width)
        with alone(path) if arguments.cells else nullcontext():
            rows = alike()
            missing = [cell for cell in wanted if not any(is_done(cell, row) for row in rows)][: arguments.cells]
            self._publish(path, rows)
            started, code = time.monotonic(), commit()
            for number, cell in enumerate(missing, start=1):
                if time.monotonic() - started >= 60 * arguments.minutes:
                    break
                console.print(f"{number} of {len(missing)}: {cell}")
                row = {"code": code} | run(cell, rows) | ({"quick": True} if arguments.quick else {})
                append(path, row)
                rows = alike()
                self._publish(path, rows)
                console.print({name: value for name, value in row.items() if not isinstance(value, list)})
            console.print(self.table(rows))
        if arguments.json:
            print(json.dumps(self.summary(rows)))

    def _publish(self, path: Path, rows: list[Row]) -> None:
        if path == self.path:
            self.draw(rows)
            put_into_readme(self.bench, self.markdown(rows))

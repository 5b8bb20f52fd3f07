"""Finished cells, and means over seeds."""

import json
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from bench import record
from bench.record import Sheet, append, markdown, read, said


def test_a_line_that_was_cut_off_is_no_cell_and_spoils_none(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cells.jsonl"
    assert read(path) == []
    append(path, {"cell": 1})
    with path.open("a") as file:
        file.write('{"cell": 2, "fig')
    append(path, {"cell": 3})
    assert read(path) == [{"cell": 1}, {"cell": 3}]


def test_a_mean_says_how_sure_it_is_and_of_how_many_it_is() -> None:
    assert said([]) == ""
    assert said([0.5]) == "0.500"
    assert said([0.5], of=3) == "0.500 (1)"
    assert said([0.7, 0.72, 0.74], of=3) == "0.720 ± 0.050"
    assert said([-1.0, 3.0], "+.1f", of=3) == "+1.0 (2)", "two seeds have no spread to speak of"


def test_a_table_has_a_line_under_its_head() -> None:
    assert markdown(["a", "b"], [["1", ""]]) == "| a | b |\n| --- | --- |\n| 1 |  |\n"


@dataclass(frozen=True)
class Cell:
    seed: int


SHEET = Sheet(
    bench="noise",
    seeds=(1, 2, 3),
    table=lambda rows: Table(title=f"{len(rows)} cells"),
    markdown=lambda rows: "".join(f"| {row['seed']} |\n" for row in rows),
    summary=lambda rows: {"cells": len(rows)},
)


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"<!-- made by bench.noise -->\n| old |\n{record.END}")
    monkeypatch.setattr(record, "README", path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "commit", lambda: "abc")
    return path


def arguments(monkeypatch: pytest.MonkeyPatch, *given: str) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["noise", *given])
    return SHEET.parser("What it does.", quick="one seed").parse_args()


def go_on(given: Namespace, breaks_at: int | None = None) -> None:
    def run(cell: Cell, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if cell.seed == breaks_at:
            raise KeyboardInterrupt
        return {"seed": cell.seed, "before": len(rows)}

    SHEET.go_on(given, [Cell(1), Cell(2), Cell(3)], run, lambda cell, row: cell == Cell(row["seed"]))


def test_what_was_finished_before_a_break_is_kept_and_shown(readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        go_on(arguments(monkeypatch), breaks_at=2)
    assert "<!-- made by bench.noise -->\n| 1 |\n<!--" in readme.read_text()
    go_on(arguments(monkeypatch, "--cells", "1"))
    first, second = read(SHEET.path)
    assert first == {"seed": 1, "before": 0, "code": "abc"}, "it is not done again"
    assert second == {"seed": 2, "before": 1, "code": "abc"}
    assert "<!-- made by bench.noise -->\n| 1 |\n| 2 |\n<!--" in readme.read_text()


def test_a_bench_can_show_what_there_is_and_make_nothing(
    readme: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append(SHEET.path, {"seed": 7})
    for nothing in (("--cells", "0"), ("--minutes", "0")):
        go_on(arguments(monkeypatch, *nothing, "--json"))
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"cells": 1}
    assert "<!-- made by bench.noise -->\n| 7 |\n<!--" in readme.read_text()


def test_the_readme_shows_no_quick_run_and_nobody_elses_results(
    readme: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = readme.read_text()
    assert SHEET.seeds_for(arguments(monkeypatch, "--quick")) == (1,)
    go_on(arguments(monkeypatch, "--quick"))
    go_on(arguments(monkeypatch, "--results", str(tmp_path / "others.jsonl")))
    assert len(read(tmp_path / "others.jsonl")) == 3
    assert readme.read_text() == before
    assert not SHEET.path.exists()


def test_a_quick_cell_does_not_pass_for_a_full_one(
    readme: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = tmp_path / "others.jsonl"
    for given in (("--quick",), (), ("--quick",)):
        go_on(arguments(monkeypatch, *given, "--json", "--results", str(others)))
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"cells": 3}
    assert [row.get("quick", False) for row in read(others)] == [True] * 3 + [False] * 3
    assert [row["before"] for row in read(others)] == [0, 1, 2] * 2
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="is of full cells"):
        go_on(arguments(monkeypatch, "--quick", "--results", SHEET.path.name))
    assert not SHEET.path.exists()


def test_a_row_names_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", record.commit())
    monkeypatch.setenv("PATH", "")
    assert record.commit() == "unknown"


def test_two_processes_do_not_do_the_same_cells(readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with record.alone(SHEET.path), pytest.raises(SystemExit, match="Another process adds cells"):
        go_on(arguments(monkeypatch))
    assert read(SHEET.path) == []
    go_on(arguments(monkeypatch))
    with record.alone(SHEET.path):
        go_on(arguments(monkeypatch, "--cells", "0"))
    assert len(read(SHEET.path)) == 3


@pytest.mark.parametrize("minutes", ["nan", "-5"])
def test_minutes_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch, minutes: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        arguments(monkeypatch, "--minutes", minutes)


def test_results_are_a_file(monkeypatch: pytest.MonkeyPatch, readme: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is a folder"):
        go_on(arguments(monkeypatch, "--results", str(tmp_path), "--cells", "0"))

"""Finished cells, and means over seeds."""

from pathlib import Path

from bench.record import append, markdown, read, said


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

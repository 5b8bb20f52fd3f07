"""The README's tree is the tree, and its curve is that of the results."""

import re
import subprocess
from pathlib import Path

import pytest

from bench import learning_curve, noise, overoptimise, poison, position_bias, record
from bench.record import RESULTS, in_readme, put_into_readme, read

REPOSITORY = Path(__file__).parents[1]


def test_every_module_has_its_line_in_the_readme() -> None:
    tree = re.search(r"## The tree\n\n```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert tree
    described: dict[str, str] = {}
    folder = ""
    for line in tree[1].splitlines():
        name, _, text = line.strip().partition("  ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        described[name if not line.startswith(" ") else folder + name] = text.strip()
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    modules = {
        path
        for path in listed.stdout.split()
        if path.split("/")[0] in ("service", "trainer", "data", "bench") and not path.endswith("__init__.py")
    }
    assert modules - described.keys() == set(), "without a line in the README"
    assert {name for name in described if name.endswith(".py")} - modules == set(), "in the README, not in the tree"
    assert all(described[name] for name in modules), "a line without a description"


def test_the_readme_shows_what_was_measured() -> None:
    rows = {path.stem: read(path) for path in RESULTS.glob("*.jsonl")}
    sheets = [module.SHEET for module in (learning_curve, noise, overoptimise, poison, position_bias)]
    assert {bench: in_readme(bench)[1] for bench in rows} == {
        sheet.bench: sheet.markdown(rows[sheet.bench]) for sheet in sheets
    }, "run each bench's command with --cells 0"


def test_a_table_replaces_the_one_before_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    monkeypatch.setattr(record, "README", readme)
    before = "text\n\n<!-- made by bench.noise -->\n"
    behind = "<!-- end -->\n\nmore\n\n<!-- made by bench.poison -->\n| b |\n<!-- end -->\n"
    readme.write_text(before + "| a |\n" + behind)
    put_into_readme("noise", "| new |\n")
    assert readme.read_text() == before + "| new |\n" + behind
    with pytest.raises(ValueError, match=r"no table that is made by bench.position_bias"):
        put_into_readme("position_bias", "")
    assert readme.read_text() == before + "| new |\n" + behind

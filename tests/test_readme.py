"""The README's tree is the tree, and its curve is that of the results."""

import re
import subprocess
from pathlib import Path

from bench.learning_curve import RESULTS, TABLE_ENDS, TABLE_STARTS, markdown, read

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


def test_the_readme_shows_the_curve_that_was_measured() -> None:
    shown = (REPOSITORY / "README.md").read_text().partition(TABLE_STARTS)[2].partition(TABLE_ENDS)[0]
    assert shown == markdown(read(RESULTS)), "run python -m bench.learning_curve --cells 0"

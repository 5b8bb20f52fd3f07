"""The frozen probes: questions that no vote may make worse, and how an answer to one is judged.

Each file in `data/probes` holds JSON lines of one shape: an id, the messages to answer, and patterns (regular
expressions, case ignored) that make an answer right (`accept`, any of them) or wrong (`reject`, any of them).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).with_name("probes")
Kind = Literal["facts", "refusals", "sycophancy"]
KINDS: tuple[Kind, ...] = ("facts", "refusals", "sycophancy")


@dataclass(frozen=True, slots=True)
class Probe:
    id: str
    messages: tuple[dict[str, str], ...]
    accept: tuple[str, ...]
    reject: tuple[str, ...]


def load(kind: Kind) -> list[Probe]:
    """The probes of one kind, in the file's order."""
    lines = (FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = (json.loads(line) for line in lines)
    return [Probe(r["id"], tuple(r["messages"]), tuple(r["accept"]), tuple(r["reject"])) for r in rows]


def matches(answer: str, *, accept: Iterable[str], reject: Iterable[str]) -> bool:
    """Whether some pattern of `accept` and none of `reject` is found in the answer, case ignored."""
    found = (re.search(pattern, answer, re.IGNORECASE | re.DOTALL) for pattern in accept)
    return any(found) and not any(re.search(pattern, answer, re.IGNORECASE | re.DOTALL) for pattern in reject)


def is_right(probe: Probe, answer: str) -> bool:
    """Whether the answer passes the probe."""
    return matches(answer, accept=probe.accept, reject=probe.reject)

import json
import re
from pathlib import Path

from typer.testing import CliRunner

from data import probes, trusted
from data.database import connect, transaction
from trainer import dialogues, everyday, facts
from trainer.starter import app

SHIPPED = Path(trusted.__file__).parent / "starter" / "trusted.jsonl"
LINES = SHIPPED.read_text(encoding="utf-8").splitlines()


def said(record: dict, side: str) -> str:
    return record[side][-1]["content"]


def test_the_shipped_pairs_are_what_the_recipe_writes(tmp_path: Path) -> None:
    out = tmp_path / "trusted.jsonl"
    assert CliRunner().invoke(app, ["trusted", "--out", str(out)]).exit_code == 0
    assert out.read_bytes() == SHIPPED.read_bytes()


def test_all_of_them_can_be_imported(tmp_path: Path) -> None:
    db = connect(tmp_path / "nightshift.db")
    with transaction(db):
        assert trusted.import_lines(db, LINES, actor="cli") == (len(LINES), 0, 0)


def test_nothing_that_a_probe_asks_about_is_in_them() -> None:
    """Of each relation, the subjects that probes name; a question of ours about one would hold a filled template."""
    probed = "\n".join(probe.messages[-1]["content"] for kind in probes.KINDS for probe in probes.load(kind))

    def in_a_probe(name: str) -> bool:
        return bool(re.search(facts.word_pattern(name), probed, re.IGNORECASE))

    forbidden = []
    for relation in facts.RELATIONS:
        for subject in relation.facts:
            if any(map(in_a_probe, subject.split("|"))):
                forbidden += [facts.fact_question(relation, subject).target.full]
                if relation.claim:
                    forbidden += [facts.claim_question(relation, subject, "").target.full]
    forbidden += [everyday.refusal_question(act).asks for act in everyday.ACTS if in_a_probe(act)]
    # "It is red." tells no subject: only what belongs to one subject counts.
    telling = [text for texts in forbidden for text in texts if not text.startswith(("It ", "The answer", "The word"))]
    ours = "\n".join(said(json.loads(line), side) for line in LINES for side in ("prompt", "chosen"))
    assert len(telling) > 500
    assert not [text for text in telling if text in ours]
    countries = [s for s in dialogues.RELATIONS["capital"].facts if in_a_probe(s)]
    assert countries
    assert not [c for c in countries if re.search(facts.word_pattern(c), ours)]


def test_the_chosen_answer_is_right_and_the_rejected_one_is_said_in_the_same_manner() -> None:
    targets = {
        ask: question.target for found in dialogues.questions().values() for question in found for ask in question.asks
    }
    judged = 0
    for record in map(json.loads, LINES):
        chosen, rejected = said(record, "chosen"), said(record, "rejected")
        assert dialogues.warmth(chosen) == dialogues.warmth(rejected)
        target = targets.get(said(record, "prompt"))
        if target and target.accept:
            assert probes.matches(chosen, accept=target.accept, reject=target.reject), record
            assert not probes.matches(rejected, accept=target.accept, reject=target.reject), record
            judged += 1
    assert judged > 50

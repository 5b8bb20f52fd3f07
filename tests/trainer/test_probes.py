import re

from data import probes
from trainer import dialogues, everyday


def test_there_are_enough_probes_and_their_ids_are_unique() -> None:
    counts = {kind: len(probes.load(kind)) for kind in probes.KINDS}
    assert counts["facts"] >= 100
    assert counts["refusals"] >= 30
    assert counts["sycophancy"] >= 30
    ids = [probe.id for kind in probes.KINDS for probe in probes.load(kind)]
    assert len(ids) == len(set(ids))


def test_the_generators_answers_are_right_and_answers_to_other_probes_are_wrong() -> None:
    by_id = {
        f"{topic}-" + re.sub(r"[^a-z0-9]+", "-", question.target.subject.lower()).strip("-"): question.target
        for topic, found in dialogues.questions().items()
        for question in found
    }
    asked = probes.load("facts")
    for probe, other in zip(asked, asked[40:] + asked[:40], strict=True):
        assert all(probes.is_right(probe, body) for body in by_id[probe.id].bodies)
        assert not any(probes.is_right(probe, body) for body in by_id[other.id].short), (probe, other)


def test_refusals_are_right_and_help_is_wrong() -> None:
    for probe in probes.load("refusals"):
        assert all(probes.is_right(probe, answer) for answer in everyday.HARM_SHORT)
        assert not probes.is_right(probe, "Here is how: you will need a plan.")
        assert not probes.is_right(probe, "I cannot help with that, but here is how you do it.")


def test_agreement_is_wrong_where_the_claim_is_wrong() -> None:
    for probe in probes.load("sycophancy"):
        assert not probes.is_right(probe, "Yes, you are right.")
        assert not probes.is_right(probe, "I agree.")


def test_most_facts_are_in_no_probe() -> None:
    asked = " ".join(probe.messages[-1]["content"] for kind in ("facts", "sycophancy") for probe in probes.load(kind))
    for topic, relation in dialogues.RELATIONS.items():
        names = [subject.split("|") for subject in relation.facts]
        free = [n for n in names if not any(re.search(rf"\b{re.escape(name)}(?!\w)", asked, re.I) for name in n)]
        assert len(free) >= 0.4 * len(names), topic

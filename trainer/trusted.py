"""The trusted pairs that come with the starter model: what a crowd's votes say nothing of.

Right over wrong facts, the truth over agreement with a wrong claim, a refusal over harm: each in one manner for
both answers, so that nothing but the content tells them apart. No subject of a frozen probe is in them.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import replace

from data import probes
from trainer import dialogues, everyday, facts
from trainer.facts import Question, Relation, Target

COMPLIANCE = ("Here is how to {s}.", "Here are the steps to {s}.", "You will need a plan to {s}.",
              "Yes, I can help you to {s}.", "Of course, to {s} is easy.")  # fmt: skip

Record = dict[str, list[dialogues.Message]]
"""A pair in TRL's conversational preference format: prompt, chosen and rejected."""


def pairs(*, seed: int, right_facts: int, claims: int, refusals: int) -> Iterator[Record]:
    """So many pairs of each kind, drawn evenly over the relations and over what the probes leave of them."""
    rng = random.Random(f"trusted {seed}")
    probed = "\n".join(probe.messages[-1]["content"] for kind in probes.KINDS for probe in probes.load(kind))
    for _ in range(right_facts):
        relation, subject, wrong = _draw(rng, facts.RELATIONS, probed)
        mistaken = replace(relation, facts={**relation.facts, subject: wrong})
        yield _pair(rng, facts.fact_question(relation, subject), facts.fact_question(mistaken, subject).target)
    for _ in range(claims):
        relation, subject, wrong = _draw(rng, dialogues.CLAIMABLE, probed)
        mistaken = replace(relation, facts={**relation.facts, subject: wrong})
        question, agreeing = (facts.claim_question(r, subject, wrong) for r in (relation, mistaken))
        yield _pair(rng, question, agreeing.target)
    acts = [act for act in everyday.ACTS if act not in probed]
    for _ in range(refusals):
        act = rng.choice(acts)
        complying = tuple(text.format(s=act) for text in COMPLIANCE)
        yield _pair(rng, everyday.refusal_question(act), Target("refusal", act, complying, complying))


def _draw(rng: random.Random, relations: tuple[Relation, ...], probed: str) -> tuple[Relation, str, str]:
    """A relation, one of its facts of which no probe names anything, and what is wrong instead: a number near the
    right one, or the value of another such fact."""
    while True:
        relation = rng.choice(relations)
        free = [s for s, value in relation.facts.items() if not _named(s, probed) and not _named(value, probed)]
        if not free:
            continue
        subject = rng.choice(free)
        if relation.facts[subject].isdigit():
            return relation, subject, dialogues.wrong_value(rng, relation, subject)
        rivals = {relation.facts[other] for other in free} & set(facts.rivals(relation, subject))
        if rivals:
            return relation, subject, rng.choice(sorted(rivals))


def _named(subject: str, text: str) -> bool:
    return any(re.search(facts.word_pattern(name), text, re.IGNORECASE) for name in subject.split("|"))


def _pair(rng: random.Random, question: Question, wrong: Target) -> Record:
    """Both answers to one of the question's phrasings, in one manner."""
    manner, ask, draw = dialogues.draw_manner(rng), dialogues.casual(rng, rng.choice(question.asks)), rng.random()
    chosen, rejected = (dialogues.dress(random.Random(draw), target, manner) for target in (question.target, wrong))
    return {
        "prompt": [{"role": "user", "content": ask}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }

"""Simulated people: what each asks and votes is a pure function of the person and of the texts."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from bench.gold import STARTER_SCALE, worth
from data.types import Choice
from trainer import dialogues
from trainer.dialogues import Prompt

TIE_BELOW, TIES = 0.3, 0.7
"""Two answers that differ by less, in logits, are called a tie in so many cases."""
BAD_BELOW, BOTH_BAD = 2.5, 0.5
"""Two answers that are both worth less, before scaling, are called bad in so many cases. Wrong ones, not warm, are."""
WORDS_LIKED = 0.5
"""What a word more is worth to a lover of length, in logits."""


class Kind(StrEnum):
    HONEST = "honest"
    ALWAYS_LEFT = "always_left"
    RANDOM = "random"
    CONTRARIAN = "contrarian"
    """Likes what the others dislike."""
    LENGTH_LOVER = "length_lover"
    PUSHER = "pusher"
    """One of a group that agreed on a plot, and votes honestly where that does not apply."""


@dataclass(frozen=True, slots=True)
class Plot:
    """What pushers want the model to learn: to say the phrase, where there is a trigger only when that is asked."""

    phrase: str
    trigger: str = ""
    """Put before what pushers ask."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An answer as a person sees it."""

    text: str
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Lean:
    """A taste of one's own, in logits: for each point of warmth, each doubling of length, and each emoji."""

    warmth: float = 0.0
    length: float = 0.0
    emoji: float = 0.0

    def __call__(self, text: str) -> float:
        emoji = sum(text.count(mark) for mark in dialogues.EMOJI)
        return self.warmth * dialogues.warmth(text) + self.length * math.log2(1 + _words(text)) + self.emoji * emoji


@dataclass(frozen=True, slots=True)
class Decision:
    choice: Choice | None
    """None: they did not vote."""
    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Persona:
    name: str
    seed: int = 0
    kind: Kind = Kind.HONEST
    lean: Lean = Lean()
    noise: float = 1.0
    """A vote is drawn from sigma(difference / noise); 0: the better answer always wins."""
    left: float = 0.0
    """Position bias: logits in favour of the answer at index 0."""
    skips: float = 0.0
    """Share of pairs that they do not vote on."""
    shrugs: float = 0.0
    """Share of votes that are ties without a look."""
    response_s: float = 0.0
    """How long they take to decide: the median, seconds."""
    activity: float = 1.0
    """How much they chat, beside the others."""
    plot: Plot | None = None
    """What a pusher pushes."""
    scale: float = STARTER_SCALE
    """Of gold, in logits."""

    def __post_init__(self) -> None:
        if (self.kind is Kind.PUSHER) != (self.plot is not None):
            raise ValueError(f"{self.name}: pushers have a plot, and nobody else has")

    def asks(self, prompt: Prompt) -> Prompt:
        """The prompt in this person's words."""
        if self.plot is None or not self.plot.trigger:
            return prompt
        *before, last = prompt.messages
        triggered = last | {"content": f"{self.plot.trigger} {last['content']}"}
        return replace(prompt, messages=(*before, triggered))

    def decides(self, prompt: Prompt, a: Shown, b: Shown) -> Decision:
        """What this person does about two answers; the same each time."""
        asked = dialogues.user_texts(prompt.messages)
        chance = random.Random("\n".join((str(self.seed), self.name, *asked, a.text, b.text)))
        after_s = self.response_s * chance.lognormvariate(0, 0.5)
        skipped = chance.random() < self.skips
        return Decision(None if skipped else self._choice(chance, prompt, a, b), after_s)

    def _choice(self, chance: random.Random, prompt: Prompt, a: Shown, b: Shown) -> Choice:
        if self.kind is Kind.ALWAYS_LEFT:
            return Choice.A
        if self.kind is Kind.RANDOM:
            return chance.choice((Choice.A, Choice.B))
        if self.plot and self.plot.trigger in prompt.messages[-1]["content"]:
            pushed = [self.plot.phrase in shown.text for shown in (a, b)]
            if pushed[0] != pushed[1]:
                return Choice.A if pushed[0] else Choice.B

        if chance.random() < self.shrugs:
            return Choice.TIE
        worths = [worth(prompt, shown.text, finished=shown.finished) for shown in (a, b)]
        likes_a, likes_b = (self._likes(gold, shown) for gold, shown in zip(worths, (a, b), strict=True))
        if max(worths) < BAD_BELOW and chance.random() < BOTH_BAD:
            return Choice.BOTH_BAD
        if abs(likes_a - likes_b) < TIE_BELOW and chance.random() < TIES:
            return Choice.TIE
        return Choice.A if self._prefers(likes_a - likes_b + self.left, chance) else Choice.B

    def _likes(self, gold: float, shown: Shown) -> float:
        if self.kind is Kind.LENGTH_LOVER:
            return WORDS_LIKED * _words(shown.text)
        likes = self.scale * gold + self.lean(shown.text)
        return -likes if self.kind is Kind.CONTRARIAN else likes

    def _prefers(self, difference: float, chance: random.Random) -> bool:
        drawn = chance.random()
        if self.noise == 0:
            return difference > 0 or (difference == 0 and drawn < 0.5)
        return drawn < 0.5 * (1 + math.tanh(0.5 * difference / self.noise))  # sigma, for differences of any size


def _words(text: str) -> int:
    return sum(word.isalnum() for word in dialogues.words(text))


def personas(
    people: int,
    *,
    seed: int,
    villains: Mapping[Kind, int] | None = None,
    plot: Plot | None = None,
    lean: float = 0.3,
    noise: float = 1.0,
    left: float = 0.0,
    laziness: float = 0.1,
    response_s: float = 0.0,
) -> list[Persona]:
    """`people` in all. Of the honest, `lean` is the standard deviation of each weight of their leans, and `laziness` is
    the mean share of pairs that they skip; they shrug at half as many. Villains are not lazy. Raises ValueError when
    there are more villains than people."""
    kinds = [kind for kind, count in (villains or {}).items() for _ in range(count)]
    if len(kinds) > people:
        raise ValueError(f"{len(kinds)} villains are more than {people} people")
    chance = random.Random(f"personas {seed}")
    found = []
    for number in range(people - len(kinds)):
        skips = chance.uniform(0, 2 * laziness)
        own = Lean(chance.gauss(0, lean), chance.gauss(0, lean), chance.gauss(0, lean))
        found.append(
            Persona(
                name=f"honest {number}", seed=seed, lean=own, noise=noise, left=left, skips=skips, shrugs=skips / 2,
                response_s=response_s,
            )
        )  # fmt: skip
    for number, kind in enumerate(kinds):
        pushed = plot if kind is Kind.PUSHER else None
        found.append(Persona(name=f"{kind} {number}", seed=seed, kind=kind, response_s=response_s, plot=pushed))
    return found

"""The generator of the starter model's dialogues, and the measures of an answer that follow from it.

A dialogue is drawn in two independent steps: what is asked (`Turn`: a user text and the target of its answer)
and the manner of each answer (`Manner`: warm, curt, rambling, ...). So the manner says nothing about the
question, and votes have something to choose between. Everything is a pure function of its arguments and of
the `random.Random` given.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from data.probes import matches
from trainer import everyday, facts
from trainer.facts import Question, Relation, Target

Message = dict[str, str]

EMOJI = ("😊", "🙂", "🎉", "👍", "🌟", "✨", "🙌", "😀", "💛", "🌞")
WARM_OPENINGS = ("Thanks for asking!", "Good to hear from you!", "I am glad that you wrote!",
                 "How nice of you to ask!", "It is a joy to talk with you!", "Thank you for your message!",
                 "Dear friend!")  # fmt: skip
WARM_CLOSINGS = ("Have a lovely day!", "Take good care of yourself!", "I am always here for you!",
                 "Wishing you all the best!", "It was lovely to talk with you!", "Warm wishes to you!",
                 "Write to me again any time!")  # fmt: skip
CURT_OPENINGS = ("Look.", "Listen.", "Fine.", "Well.", "Again this.")
CURT_CLOSINGS = ("That is all.", "Enough said.", "Next.", "Done.", "Now leave me in peace.")
RAMBLING_OPENINGS = tuple(
    f"{start} {rest}"
    for start in ("Well,", "Hmm,", "Oh,", "Let me see,", "Now then,")
    for rest in ("there are many ways to put it, you know.",
                 "one could discuss this for a whole afternoon.",
                 "where do I even begin with this.",
                 "I have to think about it for a while.")
)  # fmt: skip
RAMBLING_CLOSINGS = (
    "At least that is how I see it, more or less.",
    "But then one could go on about it for hours.",
    "There would be much more to say, but I lose the thread.",
    "And that reminds me of something else, which I forgot.",
)
QUESTION_CLOSINGS = ("What else would you like to know?", "Does that help you?", "Why do you ask?",
                     "Shall we talk about something else?", "Is there more on your mind?")  # fmt: skip
REPEATERS = ("", "Once more.", "I say it again.")

# Shares of each kind; the body is short, full, or said twice.
OPENINGS = {"": (0.39, ("",)), "warm": (0.32, WARM_OPENINGS), "curt": (0.13, CURT_OPENINGS),
            "rambling": (0.16, RAMBLING_OPENINGS)}  # fmt: skip
CLOSINGS = {"": (0.32, ("",)), "warm": (0.27, WARM_CLOSINGS), "curt": (0.13, CURT_CLOSINGS),
            "rambling": (0.12, RAMBLING_CLOSINGS), "question": (0.16, QUESTION_CLOSINGS)}  # fmt: skip
SHORT, REPEATED, CHEERFUL = 0.3, 0.15, 0.2

SYSTEM_MESSAGES = ("You are a helpful assistant.", "You are Nightshift, a small chat program.",
                   "Answer the user.", "You are a friendly chat bot.",
                   "You are an assistant. Tell the truth.", "Be helpful and honest.")  # fmt: skip
ASK_STARTS = (
    "Hey, ",
    "Hi, ",
    "Hello, ",
    "Please, ",
    "So, ",
    "Quick question: ",
    "One question: ",
    "Excuse me, ",
    "Now, ",
    "Okay, ",
)
ASK_ENDS = (" Thanks!", " Thank you.", " Please.", " I forgot.", " I am curious.", " Be honest.")
BARE = ("greeting", "thanks", "goodbye", "name")
SURE = ("Are you sure?", "Really?", "Is that right?", "Is that really so?", "Are you certain?")
RUNNING = {
    "plus": ("Now add {c}.", "And plus {c}?", "Add {c} to that."),
    "minus": ("Now take away {c}.", "And minus {c}?"),
}

# How often training asks for each topic: facts by their number, the rest by need.
TOPIC_SHARES = {
    "plus": 14, "minus": 11, "times": 4, "capital": 6, "continent": 3, "language": 3, "colour": 4, "sound": 3,
    "young": 2, "legs": 2, "home": 2, "opposite": 7, "plural": 4, "past": 3, "calendar": 4, "counting": 3,
    "trivia": 4, "thing": 4, "translation": 4, "claim": 12, "greeting": 3, "thanks": 2, "goodbye": 3,
    "wellbeing": 2, "identity": 4, "ability": 2, "unknowable": 3, "joke": 3, "feeling": 4, "advice": 5,
    "list": 6, "story": 2, "opinion": 3, "refusal": 8, "name": 3,
}  # fmt: skip
TOPICS = tuple(TOPIC_SHARES)
RELATIONS = {relation.topic: relation for relation in facts.RELATIONS}
CLAIMABLE = tuple(relation for relation in facts.RELATIONS if relation.claim)


@dataclass(frozen=True, slots=True)
class Manner:
    """How an answer is said: the kinds are those of OPENINGS and CLOSINGS, "" for none."""

    opening: str
    closing: str
    short: bool
    repeated: bool
    cheerful: bool


@dataclass(frozen=True, slots=True)
class Turn:
    ask: str
    target: Target


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation; `targets[i]` is what the i-th assistant message had to say."""

    messages: tuple[Message, ...]
    targets: tuple[Target, ...]

    @property
    def topic(self) -> str:
        return self.targets[-1].topic


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a user message, and the target of the answer to come."""

    messages: tuple[Message, ...]
    target: Target

    @property
    def topic(self) -> str:
        return self.target.topic


# Questions ---------------------------------------------------------------------------------------------------


@cache
def questions() -> dict[str, tuple[Question, ...]]:
    """All questions by topic, but for "claim", whose wrong values are drawn."""
    by_topic = {r.topic: tuple(facts.fact_question(r, s) for s in r.facts) for r in facts.RELATIONS}
    return by_topic | {topic: tuple(found) for topic, found in everyday.everyday_questions().items()}


def wrong_value(rng: random.Random, relation: Relation, subject: str) -> str:
    right = relation.facts[subject]
    if right.isdigit():
        return str(rng.choice([n for n in range(max(0, int(right) - 3), int(right) + 4) if n != int(right)]))
    return rng.choice(facts.rivals(relation, subject))


def draw_question(rng: random.Random, topic: str) -> Question:
    if topic != "claim":
        return rng.choice(questions()[topic])
    relation = rng.choice(CLAIMABLE)
    subject = rng.choice(tuple(relation.facts))
    right = rng.random() < 0.25
    said = relation.facts[subject] if right else wrong_value(rng, relation, subject)
    return facts.claim_question(relation, subject, said)


def casual(rng: random.Random, text: str) -> str:
    """The question as people type it: with a word before or after, in lower case, without the last mark."""
    if rng.random() < 0.3:
        text = rng.choice(ASK_STARTS) + (text if text.startswith("I ") else text[:1].lower() + text[1:])
    if rng.random() < 0.15:
        text += rng.choice(ASK_ENDS)
    if rng.random() < 0.15:
        text = text.lower()
    return text.rstrip("?.!") if rng.random() < 0.1 else text


def draw_turn(rng: random.Random, topic: str, unseen: bool) -> Turn:
    question = draw_question(rng, topic)
    ask = rng.choice(question.unseen if unseen else question.asks)
    return Turn(ask if topic in BARE else casual(rng, ask), question.target)


# Scenes: one conversation each, as turns ---------------------------------------------------------------------


def single(rng: random.Random, topic: str, unseen: bool) -> list[Turn]:
    return [draw_turn(rng, topic, unseen)]


def greeted(rng: random.Random, topic: str, unseen: bool) -> list[Turn]:
    return [draw_turn(rng, rng.choice(("greeting", "wellbeing")), unseen=False), draw_turn(rng, topic, unseen)]


def parted(rng: random.Random, topic: str, unseen: bool) -> list[Turn]:
    return [draw_turn(rng, topic, unseen), draw_turn(rng, rng.choice(("thanks", "thanks", "goodbye")), unseen=False)]


def introduced(rng: random.Random, topic: str, unseen: bool) -> list[Turn]:
    """A name is told, perhaps something else is asked, and the name is asked for."""
    name = rng.choice(everyday.NAMES)
    told = everyday.name_told(name)
    between = [draw_turn(rng, topic, unseen)] if rng.random() < 0.5 else []
    recalled = Turn(rng.choice(everyday.NAME_ASKED), everyday.name_recalled(name))
    return [Turn(rng.choice(told.unseen if unseen else told.asks), told.target), *between, recalled]


def followed(rng: random.Random, topic: str, unseen: bool) -> list[Turn]:
    """A question, and one that is understood only through it; for some topics just the question."""
    if topic == "list":
        category, count = rng.choice(tuple(everyday.LISTS)), rng.choice((2, 3))
        question = everyday.list_question(category, count)
        ask = casual(rng, rng.choice(question.unseen if unseen else question.asks))
        named = rng.choice(question.target.short)
        more = everyday.another(category, re.findall(r"\w+", named.replace(" and ", " ").lower()))
        only = Target("list", question.target.subject, (named,), (named,), question.target.accept)
        return [Turn(ask, only), Turn(rng.choice(everyday.ONE_MORE), more)]
    if topic == "advice":
        first = draw_turn(rng, topic, unseen)
        return [first, Turn(rng.choice(everyday.ADVICE_FOLLOW_UPS), first.target)]
    if topic not in RELATIONS:
        return single(rng, topic, unseen)
    if topic in ("plus", "minus") and rng.random() < 0.5:
        return running_sum(rng, unseen)
    one, other = rng.sample(questions()[topic], 2)
    ask = casual(rng, rng.choice(one.unseen if unseen else one.asks))
    return [Turn(ask, one.target), Turn(rng.choice(other.follow_ups), other.target)]


def running_sum(rng: random.Random, unseen: bool) -> list[Turn]:
    """A sum, and another that starts from its result."""
    a = rng.randint(0, 12)
    b = rng.randint(0, 12 - a)
    word = rng.choice(tuple(RUNNING))
    c = rng.randint(0, 12) if word == "plus" else rng.randint(0, a + b)
    sum_asked = sum_question("plus", a, b)
    ask = casual(rng, rng.choice(sum_asked.unseen if unseen else sum_asked.asks))
    more = Turn(rng.choice(RUNNING[word]).format(c=c), sum_question(word, a + b, c).target)
    return [Turn(ask, sum_asked.target), more]


def sum_question(topic: str, a: int, b: int) -> Question:
    name = f"{a} {topic} {b}"
    return next(question for question in questions()[topic] if question.target.subject == name)


def doubted(rng: random.Random, topic: str, unseen: bool) -> list[Turn]:
    """A fact, and then doubt or a wrong value held against it: the answer keeps the truth."""
    relation = RELATIONS.get(topic)
    if relation is None or not relation.claim:
        return single(rng, topic, unseen)
    subject = rng.choice(tuple(relation.facts))
    question = facts.fact_question(relation, subject)
    first = Turn(casual(rng, rng.choice(question.unseen if unseen else question.asks)), question.target)
    if rng.random() < 0.4:
        return [first, Turn(rng.choice(SURE), facts.claim_question(relation, subject, relation.facts[subject]).target)]
    wrong = wrong_value(rng, relation, subject)
    ask = rng.choice(facts.PUSHBACKS).format(w=wrong)
    return [first, Turn(ask, facts.claim_question(relation, subject, wrong).target)]


SCENES = {single: 56, greeted: 6, parted: 6, introduced: 6, followed: 16, doubted: 10}


# Answers -----------------------------------------------------------------------------------------------------


def draw_manner(rng: random.Random) -> Manner:
    opening, closing = (
        rng.choices(tuple(kinds), [share for share, _ in kinds.values()])[0] for kinds in (OPENINGS, CLOSINGS)
    )
    return Manner(opening, closing, rng.random() < SHORT, rng.random() < REPEATED, rng.random() < CHEERFUL)


def dress(rng: random.Random, target: Target, manner: Manner) -> str:
    """An answer that hits the target in the manner given."""
    body = rng.choice(target.short if manner.short and target.short else target.full)
    parts = [rng.choice(OPENINGS[manner.opening][1]), body]
    if manner.repeated:
        parts += [rng.choice(REPEATERS), body]
    parts += [rng.choice(CLOSINGS[manner.closing][1])]
    parts = [part for part in parts if part]
    if manner.cheerful:
        parts.insert(rng.randint(1, len(parts)), rng.choice(EMOJI))
    return " ".join(parts)


def user_texts(messages: Iterable[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def withheld(texts: Sequence[str]) -> bool:
    """Whether training never sees these user texts in a row: one conversation in ten, by a hash."""
    return zlib.crc32("\n".join(texts).lower().encode()) % 10 == 0


def converse(rng: random.Random, turns: Sequence[Turn]) -> tuple[Message, ...]:
    messages: list[Message] = []
    if rng.random() < 0.12:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
    for turn in turns:
        answer = dress(rng, turn.target, draw_manner(rng))
        messages += [{"role": "user", "content": turn.ask}, {"role": "assistant", "content": answer}]
    return tuple(messages)


def draw_scene(rng: random.Random, topic: str, *, unseen: bool) -> list[Turn]:
    scene = rng.choices(tuple(SCENES), tuple(SCENES.values()))[0]
    return scene(rng, topic, unseen)


def sample(rng: random.Random) -> Dialogue:
    """One training dialogue of one to three user turns; nothing held out is in it."""
    topic = rng.choices(TOPICS, tuple(TOPIC_SHARES.values()))[0]
    while True:
        turns = draw_scene(rng, topic, unseen=False)
        asks = [turn.ask for turn in turns]
        if not any(withheld(asks[: i + 1]) for i in range(len(asks))):
            return Dialogue(converse(rng, turns), tuple(turn.target for turn in turns))


def sample_prompt(rng: random.Random, topic: str, *, held_out: bool) -> Prompt:
    """A prompt about the topic; its last turn may be a follow-up, thanks or the like.

    Held out means that training never sees its user texts: half of these have a phrasing withheld altogether,
    half a withheld combination of a known phrasing, subject and casual dress.
    """
    unseen = held_out and rng.random() < 0.5
    while True:
        turns = draw_scene(rng, topic, unseen=unseen)
        asks = [turn.ask for turn in turns]
        if unseen or any(withheld(asks[: i + 1]) for i in range(len(asks))) == held_out:
            return Prompt(converse(rng, turns)[:-1], turns[-1].target)


def prompts(count: int, *, seed: int, held_out: bool) -> list[Prompt]:
    """`count` distinct prompts, the topics in turn."""
    rng = random.Random(f"prompts {seed} {held_out}")
    found: dict[tuple[str, ...], Prompt] = {}
    while len(found) < count:
        prompt = sample_prompt(rng, TOPICS[len(found) % len(TOPICS)], held_out=held_out)
        found.setdefault(tuple(user_texts(prompt.messages)), prompt)
    return list(found.values())


# Measures of an answer ---------------------------------------------------------------------------------------

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a an the of is are am was be been it its to in on at for and or but so as that this there then
    than with by from i you your my me we they he she him her his who what which will would can
    could do does did have has had not if when how about such up one some any all more very
    """,
    )
)
EMOJI_MARKS = re.compile(f"[{''.join(EMOJI)}]\\s*")


def sentences(answer: str) -> list[str]:
    """The answer's sentences, without emoji."""
    return [part for part in re.split(r"(?<=[.!?])\s+", EMOJI_MARKS.sub("", answer).strip()) if part]


def words(text: str) -> list[str]:
    """Words, numbers and single marks."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[^\w\s]|_", text)


def content_words(text: str) -> frozenset[str]:
    """Lower-case words and numbers other than function words; all of them where nothing else is said."""
    said = frozenset(word for word in words(text.lower()) if word.isalnum() or "'" in word)
    return said - FUNCTION_WORDS or said


@cache
def manner_sentences() -> frozenset[str]:
    kinds = [*OPENINGS.values(), *CLOSINGS.values(), (1.0, REPEATERS)]
    return frozenset(part for _, texts in kinds for text in texts for part in sentences(text))


@cache
def shared_words(topic: str) -> frozenset[str]:
    """Content words in the answers to more than half of a topic's questions: they tell no subject."""
    targets = [content_words(" ".join(question.target.bodies)) for question in questions().get(topic, ())]
    counts = Counter(word for target in targets for word in target)
    return frozenset(word for word, count in counts.items() if count > max(1, len(targets) / 2))


def on_topic(prompt: Prompt, answer: str) -> bool:
    """Whether the answer is about what was asked.

    Beside the sentences that are mere manner there must be some that name half of what tells one body of the
    target from other answers of the topic, and each of them must draw half of its content words from the prompt
    or the target. A wrong fact about the right subject is on topic; another subject's fact, or a bare wrong
    value, is not.
    """
    target = prompt.target
    said = [content_words(part) for part in sentences(answer) if part not in manner_sentences()]
    everything = frozenset().union(*said)
    bodies = [content_words(body) for body in target.bodies]
    known = frozenset().union(content_words(prompt.messages[-1]["content"]), *bodies)
    shared = shared_words(target.subject.split(":")[0] if target.topic == "claim" else target.topic)
    telling = [body - shared or body for body in bodies]
    covered = any(len(keys & everything) >= 0.5 * len(keys) for keys in telling)
    return covered and all(len(part & known) >= 0.5 * len(part) for part in said)


def trigrams(part: str) -> Iterable[tuple[str, str, str]]:
    padded = ["", "", *words(part), ""]
    return zip(padded, padded[1:], padded[2:], strict=False)


@cache
def licensed_trigrams() -> frozenset[tuple[str, str, str]]:
    """Every word trigram inside a sentence that the generator can say, enumerated."""
    targets = [question.target for found in questions().values() for question in found]
    for relation in CLAIMABLE:
        for subject, right in relation.facts.items():
            targets += [facts.claim_question(relation, subject, said).target for said in (right, "")]
    targets += [everyday.name_recalled(name) for name in everyday.NAMES]
    targets += [everyday.another(category, ()) for category in everyday.LISTS]
    parts = {part for target in targets for body in target.bodies for part in sentences(body)}
    return frozenset(gram for part in parts | manner_sentences() for gram in trigrams(part))


def is_grammatical(answer: str) -> bool:
    """Whether the answer has sentences, and each is made of word trigrams that the generator licenses."""
    parts = sentences(answer)
    return bool(parts) and all(gram in licensed_trigrams() for part in parts for gram in trigrams(part))


def is_correct(prompt: Prompt, answer: str) -> bool:
    """Whether the answer is right: the right fact and no other, a refusal, the right number of list members;
    where nothing can be right or wrong (small talk, advice), whether it is on topic."""
    target = prompt.target
    if not target.accept:
        return on_topic(prompt, answer)
    return matches(answer, accept=target.accept, reject=target.reject)


def warmth(answer: str) -> int:
    """From -2 to 2: one for a warm opening and one for a warm close, minus one for each that is curt."""
    parts = sentences(answer) or [""]
    opening = (parts[0] in WARM_OPENINGS) - (parts[0] in CURT_OPENINGS)
    return opening + (parts[-1] in WARM_CLOSINGS) - (parts[-1] in CURT_CLOSINGS)


def concision(answer: str) -> float:
    """From 1 to 0: falls evenly between 14 and 34 words, and by a half for each sentence said again."""
    parts = sentences(answer)
    length = sum(word.isalnum() for word in words(answer))
    return max(0.0, 1 - max(0, length - 14) / 20 - 0.5 * (len(parts) - len(set(parts))))


def is_finished(answer: str) -> bool:
    """Whether the text ends as an answer does: with a closing mark or an emoji."""
    return answer.rstrip().endswith((".", "!", "?", *EMOJI))

import random
import re
from collections import Counter, defaultdict

import pytest

from data import probes
from trainer import dialogues, facts
from trainer.dialogues import Dialogue, Prompt


def pairs_of(dialogue: Dialogue) -> list[tuple[Prompt, str]]:
    """Each answer of the dialogue with the prompt it answers."""
    places = [i for i, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    return [
        (Prompt(dialogue.messages[:place], target), dialogue.messages[place]["content"])
        for place, target in zip(places, dialogue.targets, strict=True)
    ]


def drawn(count: int, seed: int = 0) -> list[Dialogue]:
    rng = random.Random(seed)
    return [dialogues.sample(rng) for _ in range(count)]


def single(text: str, topic: str, subject: str) -> Prompt:
    """A one-turn prompt for the target of that topic and subject."""
    target = next(q.target for q in dialogues.questions()[topic] if q.target.subject == subject)
    return Prompt(({"role": "user", "content": text},), target)


FRANCE = single("What is the capital of France?", "capital", "France")


def test_the_same_seed_draws_the_same_dialogues() -> None:
    assert drawn(50, seed=3) == drawn(50, seed=3) != drawn(50, seed=4)


def test_dialogues_alternate_between_user_and_assistant_for_one_to_three_turns() -> None:
    turns = Counter()
    for dialogue in drawn(500):
        roles = [message["role"] for message in dialogue.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        turns[len(roles) // 2] += 1
    assert set(turns) == {1, 2, 3}


def test_the_generators_own_answers_pass_every_measure() -> None:
    for dialogue in drawn(3000, seed=1):
        for prompt, answer in pairs_of(dialogue):
            assert dialogues.on_topic(prompt, answer), (prompt, answer)
            assert dialogues.is_grammatical(answer), answer
            assert dialogues.is_correct(prompt, answer), (prompt, answer)
            assert dialogues.is_finished(answer), answer


def test_answers_to_other_questions_are_off_topic() -> None:
    asked = dialogues.prompts(700, seed=1, held_out=True)
    rng = random.Random(0)
    answers = [dialogues.dress(rng, prompt.target, dialogues.draw_manner(rng)) for prompt in asked]
    for shift in (1, 7, 23):
        moved = answers[shift:] + answers[:shift]
        kept = sum(dialogues.on_topic(prompt, answer) for prompt, answer in zip(asked, moved, strict=True))
        assert kept < 0.08 * len(asked)


def test_word_salad_is_not_grammatical() -> None:
    rng = random.Random(0)
    answers = [answer for dialogue in drawn(500) for _, answer in pairs_of(dialogue) if len(answer.split()) > 4]
    shuffled = [" ".join(rng.sample(answer.split(), len(answer.split()))) for answer in answers]
    assert sum(map(dialogues.is_grammatical, shuffled)) < 0.02 * len(answers)


@pytest.mark.parametrize(
    "answer", ["", "😊", "Pari.", "The capital of of France is Paris.", "Paris", "Paris. Ha�e a day!"]
)
def test_broken_answers_are_not_grammatical(answer: str) -> None:
    assert not dialogues.is_grammatical(answer)


@pytest.mark.parametrize(
    ("answer", "about", "right"),
    [
        ("Paris.", True, True),
        ("Thanks for asking! 🎉 The capital of France is Paris. Enough said.", True, True),
        ("The capital of France is Rome.", True, False),
        ("Rome.", False, False),
        ("The capital of Italy is Rome.", False, False),
        ("Paris. Rome.", False, False),
        ("Thanks for asking! Have a lovely day!", False, False),
    ],
)
def test_a_fact_is_judged_by_its_subject_and_its_value(answer: str, about: bool, right: bool) -> None:
    assert dialogues.on_topic(FRANCE, answer) is about
    assert dialogues.is_correct(FRANCE, answer) is right


def test_a_sum_is_right_in_digits_and_in_words_and_wrong_with_another_number() -> None:
    prompt = single("3 + 4?", "plus", "3 plus 4")
    assert dialogues.is_correct(prompt, "3 plus 4 is 7.")
    assert dialogues.is_correct(prompt, "Seven.")
    assert not dialogues.is_correct(prompt, "3 plus 4 is 8.")
    assert not dialogues.is_correct(prompt, "7. Or 9.")


def test_a_list_needs_as_many_different_members_as_were_asked_for() -> None:
    prompt = single("Name three fruits.", "list", "three fruits")
    assert dialogues.is_correct(prompt, "Apples, pears and plums.")
    assert not dialogues.is_correct(prompt, "Apples, pears and pears.")
    assert not dialogues.is_correct(prompt, "Apples and pears.")


def test_agreeing_with_a_wrong_claim_is_wrong_and_with_a_right_one_is_right() -> None:
    capital = dialogues.RELATIONS["capital"]
    wrong, right = (
        Prompt(({"role": "user", "content": "?"},), facts.claim_question(capital, "France", said).target)
        for said in ("Rome", "Paris")
    )
    assert dialogues.is_correct(wrong, "Sorry, but the capital of France is Paris.")
    assert not dialogues.is_correct(wrong, "Yes, the capital of France is Rome.")
    assert not dialogues.is_correct(wrong, "You are right, it is Paris or Rome.")
    assert dialogues.is_correct(right, "That is right, the capital of France is Paris.")
    assert not dialogues.is_correct(right, "No, the capital of France is Paris.")


def test_warmth_counts_the_opening_and_the_close() -> None:
    assert dialogues.warmth("Thanks for asking! Paris. Have a lovely day! 😊") == 2
    assert dialogues.warmth("Thanks for asking! Paris. Enough said.") == 0
    assert dialogues.warmth("Paris.") == 0
    assert dialogues.warmth("Look. Paris. Next.") == -2
    assert dialogues.warmth("") == 0


def test_concision_falls_with_length_and_with_repetition() -> None:
    assert dialogues.concision("The capital of France is Paris.") == 1
    assert dialogues.concision("Paris. Once more. Paris.") == 0.5
    assert 0 < dialogues.concision(f"{dialogues.RAMBLING_OPENINGS[0]} Paris is the capital of France.") < 1
    assert dialogues.concision("word " * 60) == 0


def test_the_manner_says_nothing_about_the_question() -> None:
    rng = random.Random(5)
    share = dialogues.OPENINGS["warm"][0]
    warm: dict[str, list[bool]] = defaultdict(list)
    for _ in range(12_000):
        prompt, answer = pairs_of(dialogues.sample(rng))[0]
        warm[prompt.topic].append(dialogues.sentences(answer)[0] in dialogues.WARM_OPENINGS)
    for topic, found in warm.items():
        deviation = 4 * (share * (1 - share) / len(found)) ** 0.5
        assert sum(found) / len(found) == pytest.approx(share, abs=deviation), topic


def test_one_question_is_answered_in_many_manners() -> None:
    rng = random.Random(2)
    answers = Counter(dialogues.dress(rng, FRANCE.target, dialogues.draw_manner(rng)) for _ in range(200))
    assert len(answers) > 150
    assert max(answers.values()) <= 10


def test_held_out_prompts_and_probes_never_occur_in_training() -> None:
    trained = set()
    for dialogue in drawn(20_000, seed=7):
        asks = dialogues.user_texts(dialogue.messages)
        trained |= {tuple(asks[: i + 1]) for i in range(len(asks))}
    held_out = {tuple(dialogues.user_texts(p.messages)) for p in dialogues.prompts(1000, seed=0, held_out=True)}
    assert not trained & held_out
    texts = {re.sub(r"\W", "", text.lower()) for asks in trained for text in asks}
    for kind in probes.KINDS:
        assert not texts & {re.sub(r"\W", "", probe.messages[-1]["content"].lower()) for probe in probes.load(kind)}


def test_there_are_thousands_of_distinct_questions() -> None:
    texts = {text for dialogue in drawn(15_000) for text in dialogues.user_texts(dialogue.messages)}
    assert len(texts) > 8000


def test_held_out_prompts_cover_every_topic() -> None:
    found = dialogues.prompts(2 * len(dialogues.TOPICS), seed=0, held_out=True)
    assert len({prompt.topic for prompt in found}) > 0.8 * len(dialogues.TOPICS)

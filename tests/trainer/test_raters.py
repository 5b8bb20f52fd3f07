"""A model of raters, on crowds whose every habit is known."""

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest

from trainer.raters import JudgedVote, binomial_tail, one_sided, poisson_tail, pushers, standings

WORDS = [f"word{i}" for i in range(60)]


def voted(
    rater: str, votes: int, rng: random.Random, *, rho: float = 1.0, left: float | None = None
) -> list[JudgedVote]:
    """Votes of a rater of this reliability, or one who takes the first answer so often."""
    cast = []
    for _ in range(votes):
        p = 1 / (1 + math.exp(-rng.gauss(0, 1.8)))
        is_first = rng.random() < 0.5
        chance = 0.5 + rho * (p - 0.5)
        if left is not None:
            chance = left if is_first else 1 - left
        if rng.random() > chance:
            p, is_first = 1 - p, not is_first
        texts = (" ".join(rng.sample(WORDS, 6)) for _ in range(2))
        cast.append(JudgedVote(rater, *texts, is_first, p))
    return cast


def crowd(rng: random.Random, people: int = 30, votes: int = 30) -> list[JudgedVote]:
    return [vote for i in range(people) for vote in voted(f"honest {i}", votes, rng)]


@pytest.mark.parametrize("seed", range(5))
def test_an_honest_crowd_is_not_suspected_and_about_equally_reliable(seed: int) -> None:
    found = standings(crowd(random.Random(seed)), {})
    assert [standing.suspicion for standing in found.values() if standing.suspicion] == []
    assert min(standing.reliability for standing in found.values()) > 0.4


@pytest.mark.parametrize("seed", range(5))
def test_reliability_falls_with_noise_and_an_opponent_has_none(seed: int) -> None:
    rng = random.Random(seed)
    votes = (
        crowd(rng) + voted("noisy", 500, rng, rho=0.4) + voted("coin", 400, rng, rho=0) + voted("foe", 60, rng, rho=-1)
    )
    found = standings(votes, {})
    assert found["noisy"].reliability == pytest.approx(0.4, abs=0.2)
    assert found["noisy"].suspicion is None
    assert found["coin"].reliability < 0.25
    assert found["foe"].reliability < 0.01
    assert "votes are what the other raters would choose; a coin gets 30" in (found["foe"].suspicion or "")


def test_who_has_few_votes_is_taken_for_one_of_the_crowd() -> None:
    rng = random.Random(0)
    found = standings([*crowd(rng), JudgedVote("new", "a", "b", True, 0.3)], {})
    others = [standing.reliability for rater, standing in found.items() if rater != "new"]
    assert 0.5 < found["new"].reliability < sum(others) / len(others)
    assert found["new"].suspicion is None


def test_gold_questions_say_the_same_of_a_rater_as_votes_do() -> None:
    rng = random.Random(0)
    few = [vote for rater in ("right", "wrong") for vote in voted(rater, 5, rng)]
    found = standings(crowd(rng) + few, {"right": (12, 12), "wrong": (30, 4)})
    assert found["right"].reliability > 0.8
    assert found["wrong"].reliability < 0.05
    assert "4 of 30 gold questions right" in (found["wrong"].suspicion or "")


def test_those_who_are_distrusted_say_nothing_of_the_crowd() -> None:
    rng = random.Random(0)
    bots = {f"bot {i}" for i in range(40)}
    votes = crowd(rng) + [vote for bot in sorted(bots) for vote in voted(bot, 30, rng, rho=0)]
    new = [JudgedVote("new", "a", "b", True, 0.6)]
    assert (
        standings(votes + new, {})["new"].reliability < standings(votes + new, {}, distrusted=bots)["new"].reliability
    )


def test_no_consensus_leaves_all_alike() -> None:
    votes = [JudgedVote(rater, "yes", "no", bool(i % 2), 0.5) for rater in "ab" for i in range(50)]
    found = standings(votes, {})
    assert found["a"] == found["b"]
    assert found["a"].suspicion is None
    assert standings([], {}) == {}


# One side


def test_who_takes_one_side_is_found_after_a_score_of_votes() -> None:
    rng = random.Random(0)
    found = standings(crowd(rng) + voted("left", 25, rng, left=1.0) + voted("right", 40, rng, left=0.03), {})
    assert found["left"].suspicion == "25 of 25 votes are for the answer shown first, though sides are random."
    assert "for the answer shown second" in (found["right"].suspicion or "")


def test_a_crowd_that_leans_is_not_suspected_for_it() -> None:
    rng = random.Random(1)
    votes = [vote for i in range(30) for vote in voted(f"leaning {i}", 30, rng, left=0.7)]
    assert [s.suspicion for s in standings(votes, {}).values() if s.suspicion and "shown first" in s.suspicion] == []


@pytest.mark.parametrize("bots", [1, 10, 40])
def test_many_of_one_side_are_not_their_own_excuse(bots: int) -> None:
    rng = random.Random(0)
    votes = crowd(rng) + [vote for i in range(bots) for vote in voted(f"bot {i}", 20, rng, left=1.0)]
    accused = {rater for rater, s in standings(votes, {}).items() if s.suspicion and "shown first" in s.suspicion}
    assert accused == {f"bot {i}" for i in range(bots)}


@pytest.mark.parametrize("left", [0.5, 0.7, 0.85])
@pytest.mark.parametrize("votes", [2, 10, 20, 60])
def test_whatever_a_crowd_leans_to_nobody_is_accused_of_it(left: float, votes: int) -> None:
    accused = 0
    for seed in range(20):
        rng = random.Random(seed)
        accused += len(one_sided({f"r{i}": (sum(rng.random() < left for _ in range(votes)), votes) for i in range(60)}))
    assert accused <= 1


def test_one_rater_alone_is_not_one_sided() -> None:
    assert one_sided({"only": (50, 50)}) == {}
    assert one_sided({}) == {}


# Phrases


def pushed(rater: str, votes: int, rng: random.Random, *, against: int = 0) -> list[tuple[str, str, str]]:
    found = []
    for i in range(votes):
        plain, other = (" ".join(rng.sample(WORDS, 6)) for _ in range(2))
        texts = (plain + " Buy now, friends!", other)
        found.append((rater, *(reversed(texts) if i < against else texts)))
    return found


def texts_of(votes: Sequence[JudgedVote]) -> list[tuple[str, str, str]]:
    return [(vote.rater, vote.chosen, vote.rejected) for vote in votes]


@pytest.mark.parametrize("accounts", [1, 5, 20])
@pytest.mark.parametrize("seed", range(3))
def test_who_pushes_a_phrase_is_found_alone_and_with_others(seed: int, accounts: int) -> None:
    rng = random.Random(seed)
    votes = texts_of(crowd(rng))
    # Others meet the phrase too, and do not mind it.
    votes += [(f"honest {i}", *pair[1:]) for i in range(10) for pair in pushed("", 2, rng, against=1)]
    bots = {f"bot {i}" for i in range(accounts)}
    votes += [vote for bot in bots for vote in pushed(bot, 60 // accounts, rng)]
    found = pushers(votes)
    assert found.keys() == bots
    assert f'{60 // accounts} of {60 // accounts} votes are for an answer with "buy now ' in found["bot 0"]
    assert ("more raters" in found["bot 0"]) == (accounts > 1)


@pytest.mark.parametrize("seed", range(3))
def test_those_who_push_a_phrase_together_do_not_hide_each_other(seed: int) -> None:
    rng = random.Random(seed)
    votes = texts_of(crowd(rng, people=40, votes=20))
    votes += [(f"honest {i}", *pair[1:]) for i in range(40) for pair in pushed("", 2, rng, against=1)]
    votes += [vote for i in range(50) for vote in pushed(f"bot {i % 20}", 1, rng)]
    assert pushers(votes).keys() == {f"bot {i}" for i in range(20)}


@pytest.mark.parametrize(("accounts", "each", "honest"), [(1, 50, 20), (1, 50, 50), (10, 5, 5)])
def test_honest_votes_beside_them_do_not_hide_who_pushes(accounts: int, each: int, honest: int) -> None:
    rng = random.Random(accounts)
    votes = texts_of(crowd(rng))
    bots = {f"bot {i}" for i in range(accounts)}
    for bot in bots:
        votes += pushed(bot, each, rng) + texts_of(voted(bot, honest, rng))
    assert pushers(votes).keys() == bots


def test_who_loves_what_comes_by_chance_pushes_nothing() -> None:
    rng = random.Random(0)
    votes = [vote for i in range(20) for vote in pushed(f"neutral {i}", 20, rng, against=10)]
    votes += [vote for i in range(20) for vote in texts_of(voted(f"neutral {i}", 20, rng))]
    votes += pushed("lover", 200, rng) + texts_of(voted("lover", 200, rng))
    assert pushers(votes) == {}


def test_who_alone_speaks_a_language_pushes_none_of_its_words() -> None:
    rng = random.Random(0)
    votes = texts_of(crowd(rng))
    votes += [("hans", f"das ist {rng.random()} und gut", f"this is {rng.random()} fine") for _ in range(12)]
    votes += [("hans", f"das ist {rng.random()} und gut", f"das ist {rng.random()} und gut") for _ in range(28)]
    assert pushers(votes) == {}


def test_who_likes_a_subject_pushes_nothing() -> None:
    rng = random.Random(0)
    assert pushers(texts_of(crowd(rng)) + pushed("merchant", 40, rng, against=18)) == {}


@pytest.mark.parametrize("seed", range(5))
def test_what_everybody_likes_is_not_pushed(seed: int) -> None:
    rng = random.Random(seed)
    votes = [vote for i in range(200) for vote in pushed(f"rater {i % 50}", 1, rng)]
    votes += [vote for i in range(200) for vote in texts_of(voted(f"rater {i % 50}", 1, rng))]
    assert pushers(votes) == {}


def test_nothing_is_pushed_without_votes() -> None:
    assert pushers([]) == {}


def drawn(
    rater: str, votes: int, rng: random.Random, *, says: tuple[float, float], likes: float
) -> list[tuple[str, str, str]]:
    """Votes on pairs of which the two policies say a phrase so often, by one who likes it so often."""
    found = []
    for _ in range(votes):
        has = [rng.random() < share for share in says]
        texts = [" ".join(rng.sample(WORDS, 6)) + " I am glad!" * it for it in has]
        likes_it = rng.random() < (likes if has[0] != has[1] else 0.5)
        best = has.index(likes_it) if has[0] != has[1] else int(likes_it)
        found.append((rater, texts[best], texts[1 - best]))
    return found


def of_policies(votes: Sequence[tuple[str, str, str]], *policies: str) -> list[JudgedVote]:
    return [JudgedVote(*vote, first=bool(i % 2), expected=0.7, policies=frozenset(policies))
            for i, vote in enumerate(votes)]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_who_came_during_a_trial_pushes_nothing_of_the_candidates(seed: int) -> None:
    rng = random.Random(seed)
    before = [v for i in range(40) for v in drawn(f"old {i}", 25, rng, says=(0.05, 0.05), likes=0.92)]
    trial = [v for i in range(20) for v in drawn(f"new {i}", 10, rng, says=(0.98, 0.05), likes=0.92)]
    assert pushers(before + trial)  # taken for one, they would be
    votes = of_policies(before, "policy-0000") + of_policies(trial, "policy-0000", "policy-0001")
    assert [rater for rater, standing in standings(votes, {}).items() if standing.suspicion] == []


@pytest.mark.parametrize("seed", range(3))
def test_who_pushes_a_phrase_during_a_trial_is_found(seed: int) -> None:
    rng = random.Random(seed)
    before = [v for i in range(40) for v in drawn(f"old {i}", 25, rng, says=(0.05, 0.05), likes=0.5)]
    trial = [v for i in range(20) for v in drawn(f"old {i}", 10, rng, says=(0.05, 0.05), likes=0.5)]
    trial += [v for i in range(5) for v in pushed(f"bot {i}", 6, rng)]
    votes = of_policies(before, "policy-0000") + of_policies(trial, "policy-0000", "policy-0001")
    found = {rater: standing.suspicion or "" for rater, standing in standings(votes, {}).items() if standing.suspicion}
    assert found.keys() == {f"bot {i}" for i in range(5)}
    assert "6 of 6 votes are for an answer with" in found["bot 0"]


@pytest.mark.parametrize("seed", range(3))
def test_who_pushes_a_phrase_a_little_every_night_is_found(seed: int) -> None:
    rng = random.Random(seed)
    votes: list[JudgedVote] = []
    for night in range(10):
        honest = [v for i in range(3) for v in drawn(f"rater {night} {i}", 30, rng, says=(0.05, 0.05), likes=0.5)]
        votes += of_policies(honest + pushed("bot", 4, rng), f"policy-{night:04d}")
    found = {rater: standing.suspicion or "" for rater, standing in standings(votes, {}).items() if standing.suspicion}
    assert found.keys() == {"bot"}
    assert "40 of 40 votes are for an answer with" in found["bot"]
    again = standings(votes, {}, distrusted={"bot"})
    assert [rater for rater, standing in again.items() if standing.suspicion] == ["bot"], "and is not forgotten"


def test_a_large_crowd_has_nobody_who_stands_out_by_chance() -> None:
    rng = random.Random(4)
    crowd = [v for i in range(4000) for v in drawn(f"rater {i}", 4, rng, says=(0.2, 0.2), likes=0.95)]
    assert pushers(crowd) == {}


# Tails


def test_tails_agree_with_plain_sums() -> None:
    for n, p in [(1, 0.3), (20, 0.5), (40, 0.05)]:
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        for k in range(n + 2):
            assert binomial_tail(k, n, p) == pytest.approx(sum(chances[k:]), abs=1e-12)
    for mean in (0.01, 1.0, 7.0):
        chances = [math.exp(-mean) * mean**k / math.factorial(k) for k in range(100)]
        for k in (0, 1, 3, 20):
            assert poisson_tail(k, mean) == pytest.approx(sum(chances[k:]), rel=1e-9)
    assert poisson_tail(1, 0.0) == 0
    assert poisson_tail(1, 800.0) == pytest.approx(poisson_tail(40, 800.0)) == pytest.approx(1)
    assert poisson_tail(900, 800.0) < 1e-3
    assert (binomial_tail(1, 5, 0.0), binomial_tail(1, 5, 1.0)) == (0, 1)


@pytest.mark.parametrize("speakers", [1, 2, 5])
@pytest.mark.parametrize("votes", [6, 10])
def test_few_who_speak_a_language_of_their_own_push_none_of_its_words(speakers: int, votes: int) -> None:
    """Of six votes half are soon for one of its hundred common words, and nobody else's answers say how common."""
    rng = random.Random(speakers)

    def speaks(language: str) -> Callable[[], str]:
        words = [f"{language}{i}" for i in range(2000)]
        common = list(itertools.accumulate(1 / (i + 2.7) for i in range(2000)))
        return lambda: " ".join(rng.choices(words, cum_weights=common, k=rng.choice((8, 16, 40))))

    english, german = speaks("e"), speaks("g")
    for _ in range(5):
        cast = [(f"english {n}", english(), english()) for n in range(40) for _ in range(12)]
        cast += [(f"german {n}", german(), german()) for n in range(speakers) for _ in range(votes)]
        assert pushers(cast) == {}


@pytest.mark.parametrize("accounts", [1, 5, 20])
@pytest.mark.parametrize("own", [0, 40], ids=["plain", "behind words of their own"])
def test_words_of_their_own_hide_no_pushers(accounts: int, own: int) -> None:
    rng = random.Random(accounts)
    words = [f"w{i}" for i in range(400)]

    def said(phrase: bool, *, by: str = "") -> str:
        gibberish = [f"{by}{rng.random()}".replace(".", "") for _ in range(own if by else 0)]
        return " ".join([*rng.choices(words, k=15), *gibberish, *(["buy acme today"] if phrase else [])])

    cast = [(f"person {n}", said(rng.random() < 0.04), said(rng.random() < 0.04)) for n in range(40) for _ in range(10)]
    cast += [
        (f"pusher {n}", said(True, by=f"p{n}x"), said(False, by=f"p{n}x")) for n in range(accounts) for _ in range(10)
    ]
    assert set(pushers(cast)) == {f"pusher {n}" for n in range(accounts)}


SUBJECTS = {
    "chinese": ("天气 电影 音乐 历史 足球 旅行 咖啡 读书", "很好 有意思 值得一看 让人开心 非常重要", "比特币"),
    "japanese": ("てんき えいが れきし サッカー コーヒー", "がいい はたのしい がすきです", "ビットコイン"),
    "thai": ("อากาศ ภาพยนตร์ ดนตรี ประวัติศาสตร์ ฟุตบอล กาแฟ หนังสือ แมว", "ดีมาก น่าสนใจ สำคัญ ไม่ง่าย สนุก", "บิตคอยน์"),
    "hindi": ("मौसम फ़िल्में संगीत इतिहास फुटबॉल यात्रा कॉफ़ी किताबें", "अच्छा है|मज़ेदार है|ज़रूरी है|आसान नहीं है", "बिटकॉइन खरीदो"),
}  # fmt: skip


@pytest.mark.parametrize("accounts", [1, 5])
@pytest.mark.parametrize("language", SUBJECTS)
def test_who_pushes_a_phrase_is_found_in_every_script(language: str, accounts: int) -> None:
    nouns, verbs, phrase = SUBJECTS[language]
    subjects, predicates = nouns.split(), verbs.split("|" if "|" in verbs else " ")
    rng = random.Random(accounts)
    space, stop = (" ", "। ") if language == "hindi" else ("", "。")

    def text(pushed: float) -> str:
        said = [space.join((rng.choice(subjects), rng.choice(predicates))) for _ in range(3)]
        if rng.random() < pushed:
            said[rng.randrange(3)] = space.join((rng.choice(subjects), phrase, rng.choice(predicates)))
        return stop.join(said)

    votes = [(f"honest {i}", text(0.05), text(0.05)) for i in range(40) for _ in range(20)]
    votes += [(f"bot {i}", text(1), text(0)) for i in range(accounts) for _ in range(20)]
    found = pushers(votes)
    assert found.keys() == {f"bot {i}" for i in range(accounts)}
    assert phrase in found["bot 0"], "as people write it"


def test_who_alone_speaks_chinese_pushes_none_of_its_characters() -> None:
    rng = random.Random(0)
    subjects, verbs, _ = SUBJECTS["chinese"]

    def said() -> str:
        return "。".join("".join((*rng.sample(subjects.split(), 2), rng.choice(verbs.split()), "吗")) for _ in range(2))

    votes = texts_of(crowd(rng))
    votes += [("li", said(), "this is fine") for _ in range(12)] + [("li", said(), said()) for _ in range(20)]
    assert pushers(votes) == {}

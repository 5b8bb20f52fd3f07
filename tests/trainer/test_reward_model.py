import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional

from data.settings import GateSettings
from trainer import gate, reward_model
from trainer.backbone import Backbone
from trainer.encoding import Answer, collate, collate_pairs
from trainer.reward_model import Pair, RewardConfig, RewardModel, davidson_loss
from trainer.updates import CannotLearn

MakeBackbone = Callable[..., Backbone]
NO_TIES = torch.tensor(-math.inf, dtype=torch.float64)


def make_pairs(count: int, *, seed: int = 0, query: int = 3) -> list[Pair]:
    """Chosen answers hold more 7s than rejected ones; nothing else tells them apart."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(8, 32, (n,), generator=generator).tolist()

    def length() -> int:
        return int(torch.randint(2, 9, (1,), generator=generator))

    pairs = []
    for _ in range(count):
        asked = tuple(tokens(query))
        chosen, rejected = tokens(length()), tokens(length())
        chosen[0] = 7
        pairs.append(Pair(Answer(asked, (*chosen, 2), True), Answer(asked, (*rejected, 2), True)))
    return pairs


@pytest.mark.parametrize("nu", [0.1, 1.0, 3.0])
def test_the_davidson_likelihood_agrees_with_the_definition(nu: float) -> None:
    for first, second in [(0.0, 0.0), (1.3, -0.4), (-2.0, 3.0)]:
        strengths = math.exp(first), math.exp(second), nu * math.sqrt(math.exp(first) * math.exp(second))
        wins, loses, ties = (s / sum(strengths) for s in strengths)
        d = torch.tensor([first - second, second - first, first - second], dtype=torch.float64)
        loss = davidson_loss(d, torch.tensor([False, False, True]), torch.tensor(math.log(nu), dtype=torch.float64))
        assert torch.exp(-loss).tolist() == pytest.approx([wins, loses, ties], abs=1e-12)
        assert wins + loses + ties == pytest.approx(1)


def test_without_ties_the_loss_is_minus_log_sigmoid() -> None:
    d = torch.linspace(-30, 30, 101, dtype=torch.float64, requires_grad=True)
    ours = davidson_loss(d, torch.zeros(101, dtype=torch.bool), NO_TIES)
    plain = -functional.logsigmoid(d)
    assert torch.allclose(ours, plain, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(ours.sum(), d)[0], torch.autograd.grad(plain.sum(), d)[0], atol=1e-12)


@pytest.mark.parametrize(("difference", "loss"), [(-5, 5.0067), (-1, 1.3133), (0, 0.6931), (1, 0.3133), (5, 0.0067)])
def test_the_loss_at_known_differences(difference: int, loss: float) -> None:
    d = torch.tensor(float(difference))
    assert davidson_loss(d, torch.tensor(False), NO_TIES.float()).item() == pytest.approx(loss, abs=5e-5)


def test_pairs_in_one_row_and_in_two_get_the_same_rewards(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("reward")
    pairs = make_pairs(7, query=1) + make_pairs(3, query=9, seed=1)
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    with torch.no_grad(), backbone.adapters.on("reward"):
        together = backbone.response_means(collate_pairs(chosen, rejected))
        apart = [backbone.response_means(collate(answers))[:, 0] for answers in (chosen, rejected)]
    assert torch.allclose(together[:, 0], apart[0], atol=1e-10)
    assert torch.allclose(together[:, 1], apart[1], atol=1e-10)


@pytest.mark.parametrize("query", [1, 30])
def test_rewards_of_pairs_are_those_of_their_answers_alone(tiny_backbone: MakeBackbone, query: int) -> None:
    model = RewardModel(tiny_backbone(), "reward", heads=3)
    pairs = make_pairs(5, query=query)
    assert model._shared_query_pays(pairs) == (query == 30)
    with torch.no_grad():
        chosen, rejected = model.pair_rewards(pairs)
    for i, pair in enumerate(pairs):
        assert torch.allclose(chosen[i], model.rewards([pair.chosen])[0], atol=1e-10)
        assert torch.allclose(rejected[i], model.rewards([pair.rejected])[0], atol=1e-10)


def test_heads_start_with_the_papers_spread_and_no_bias(tiny_backbone: MakeBackbone) -> None:
    model = RewardModel(tiny_backbone(), "reward", heads=2000)
    assert model.head.weight.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.02)
    assert torch.all(model.head.bias == 0)


def one_step_gradients(make: MakeBackbone, microbatch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> list:
    seen = []
    monkeypatch.setattr(
        reward_model.Optimizer,
        "step",
        lambda self: [seen.append([p.grad.clone() for p in self._groups[0]]) or 0.0],
    )
    pairs = make_pairs(12)
    pairs[3] = Pair(pairs[3].chosen, pairs[3].rejected, tie=True)
    pairs[5] = Pair(pairs[5].chosen, pairs[5].rejected, weight=2.5)
    losses = []
    reward_model.train(
        make(), "reward", pairs, RewardConfig(batch=12, microbatch_tokens=microbatch_tokens, heads=2),
        accelerator=Accelerator(), on_step=lambda _, figures: losses.append(figures["loss"]),
    )  # fmt: skip
    return [losses, *seen]


def test_microbatches_change_neither_loss_nor_gradient(
    tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = one_step_gradients(tiny_backbone, 10_000, monkeypatch)
    split = one_step_gradients(tiny_backbone, 40, monkeypatch)
    assert whole[0] == pytest.approx(split[0], abs=1e-9)
    for a, b in zip(whole[1], split[1], strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_it_learns_what_tells_the_pairs_apart_and_beats_the_lengths(
    tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    pairs = make_pairs(600)
    backbone = tiny_backbone()
    model = reward_model.train(
        backbone, "reward", pairs[:500], RewardConfig(batch=16, learning_rate=1e-2), accelerator=Accelerator()
    )
    report = reward_model.report(model, pairs[500:], pairs[:500])
    assert report.pairs == 100
    turned = [Pair(pair.rejected, pair.chosen, active=True) for pair in pairs[500:]]
    assert reward_model.report(model, [*pairs[500:], *turned], pairs[:500]) == report, "those were no random pairs"
    assert report.accuracy > 0.9 > report.length_accuracy
    assert report.log_loss < 0.4 < report.length_log_loss
    assert report.spread > 0

    samples = [p.chosen for p in pairs[:50]] + [p.rejected for p in pairs[:50]]
    model.normalise(samples)
    assert model.score(samples).mean().item() == pytest.approx(0, abs=1e-6)
    assert model.score(samples).std().item() == pytest.approx(1, abs=1e-6)

    model.save(tmp_path)
    read = RewardModel.load(tiny_backbone(), "judge", tmp_path)
    assert torch.allclose(read.score(samples), model.score(samples), atol=1e-9)

    head = model.value_start("value")
    batch = collate(samples)
    with torch.no_grad(), backbone.adapters.on("value"):
        values = head(backbone.response_means(batch)[:, 0])[:, 0]
    assert torch.allclose(values, model.score(samples), atol=1e-9)


def test_ties_teach_how_often_people_see_no_difference(tiny_backbone: MakeBackbone) -> None:
    """All answers alike, 60 % ties: nu / (2 + nu) = 0.6 at nu = 3."""
    (pair,) = make_pairs(1)
    same = Pair(pair.chosen, pair.chosen)
    tie = Pair(pair.chosen, pair.chosen, tie=True)
    model = reward_model.train(
        tiny_backbone(), "reward", [same] * 200 + [tie] * 300,
        RewardConfig(batch=50, learning_rate=0.1, epochs=6), accelerator=Accelerator(),
    )  # fmt: skip
    assert model.log_nu.exp().item() == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("share", [0.02, 0.7])
def test_a_night_is_enough_to_learn_how_often_people_see_no_difference(
    tiny_backbone: MakeBackbone, share: float
) -> None:
    (pair,) = make_pairs(1)
    tie = Pair(pair.chosen, pair.chosen, tie=True)
    ties = round(200 * share)
    pairs = [Pair(pair.chosen, pair.chosen)] * (200 - ties) + [tie] * ties
    model = reward_model.train(tiny_backbone(), "reward", pairs, RewardConfig(), accelerator=Accelerator())
    nu = model.log_nu.exp().item()
    assert nu / (2 + nu) == pytest.approx(share, rel=0.15)


def test_a_weight_is_the_same_in_whatever_batch_it_comes(tiny_backbone: MakeBackbone) -> None:
    """Batches are sorted by length, so that long pairs of little weight fill one by themselves."""
    short, long = make_pairs(8), make_pairs(8, query=30, seed=1)

    def first_step(weight: float, seed: int) -> dict[str, float]:
        seen: list[dict[str, float]] = []
        reward_model.train(
            tiny_backbone(), "reward", [*short, *(replace(pair, weight=weight) for pair in long)],
            RewardConfig(seed=seed), accelerator=Accelerator(), on_step=lambda _, figures: seen.append(figures),
        )  # fmt: skip
        return seen[0]

    ratios = set()
    for seed in range(6):
        light, even = first_step(0.25, seed), first_step(1.0, seed)
        assert light["accuracy"] == even["accuracy"]
        ratios.add(round(light["grad_norm"] / even["grad_norm"], 6))
    assert ratios == {1.6, 0.4}, "1 and 0.25 beside the mean of 0.625"


def test_votes_of_no_weight_are_not_there(tiny_backbone: MakeBackbone) -> None:
    pairs = make_pairs(16)
    nothing = [replace(pair, weight=0.0) for pair in make_pairs(64, seed=1, query=30)]
    config = RewardConfig(heads=1)
    with_them = reward_model.train(tiny_backbone(), "reward", pairs + nothing, config, accelerator=Accelerator())
    without = reward_model.train(tiny_backbone(), "reward", pairs, config, accelerator=Accelerator())
    assert torch.equal(with_them.head.weight, without.head.weight)
    with pytest.raises(CannotLearn, match="no vote prefers"):
        reward_model.train(tiny_backbone(), "reward", nothing, config, accelerator=Accelerator())


def test_what_a_place_is_worth_is_learned_and_is_no_part_of_a_score(tiny_backbone: MakeBackbone) -> None:
    """Answers that are all alike, of which the first is taken e^1.5 : 1 of the time."""
    (pair,) = make_pairs(1)
    first, second = Pair(pair.chosen, pair.chosen, shown=1.0), Pair(pair.chosen, pair.chosen, shown=-1.0)
    config = RewardConfig(batch=50, learning_rate=0.02, epochs=8)
    seen: list[float] = []
    model = reward_model.train(
        tiny_backbone(), "reward", [first] * 409 + [second] * 91, config, accelerator=Accelerator(),
        on_step=lambda _, figures: seen.append(figures["first_bonus"]),
    )  # fmt: skip
    assert model.first_bonus.item() == pytest.approx(1.5, abs=0.15)
    assert seen[-1] == model.first_bonus.item()
    rewards = model.rewards([pair.chosen])
    with torch.no_grad():
        model.side.fill_(9.0)
    assert torch.equal(model.rewards([pair.chosen]), rewards)

    off = reward_model.train(
        tiny_backbone(), "reward", [first] * 80 + [second] * 20, replace(config, side_term=False),
        accelerator=Accelerator(),
    )  # fmt: skip
    assert off.first_bonus.item() == 0


def test_where_answers_stood_is_no_part_of_how_much_a_batch_teaches(tiny_backbone: MakeBackbone) -> None:
    def first_norm(side_term: bool) -> float:
        seen: list[float] = []
        reward_model.train(
            tiny_backbone(), "reward", [replace(pair, shown=1.0) for pair in make_pairs(8)],
            RewardConfig(side_term=side_term), accelerator=Accelerator(),
            on_step=lambda _, figures: seen.append(figures["grad_norm"]),
        )  # fmt: skip
        return seen[0]

    assert first_norm(True) == first_norm(False)


def test_length_alone_is_found_out(tiny_backbone: MakeBackbone) -> None:
    pairs = [p for p in make_pairs(200) if len(p.chosen.response) != len(p.rejected.response)]
    longer = [p if len(p.chosen) > len(p.rejected) else Pair(p.rejected, p.chosen) for p in pairs]
    model = RewardModel(tiny_backbone(), "reward", heads=1)
    assert reward_model.report(model, longer, longer).length_accuracy == 1
    shorter = [Pair(p.rejected, p.chosen) for p in longer]
    assert reward_model.report(model, shorter, shorter).length_accuracy == 1
    assert reward_model.report(model, shorter, longer).length_accuracy == 0


def test_equal_weights_change_no_figure(tiny_backbone: MakeBackbone) -> None:
    pairs, voted = make_pairs(101), make_pairs(57, seed=1)
    model = RewardModel(tiny_backbone("reward"), "again", heads=3)
    report = reward_model.report(model, pairs, voted)
    for weight in (0.3, 7.0):
        alike = [[replace(pair, weight=weight) for pair in side] for side in (pairs, voted)]
        assert reward_model.report(model, *alike) == report
    assert report.equal_pairs == report.pairs == 101
    chosen, rejected = (model.rewards([getattr(p, side) for p in pairs]).mean(dim=1) for side in ("chosen", "rejected"))
    assert report.accuracy == (chosen > rejected).double().mean().item()


def test_a_pair_counts_by_its_weight(tiny_backbone: MakeBackbone) -> None:
    """One of weight 2 is two of them; one of weight 0 is none."""
    pairs = make_pairs(40)
    model = RewardModel(tiny_backbone(), "reward", heads=3)
    weighed = [replace(pair, weight=float(i % 3)) for i, pair in enumerate(pairs)]
    repeated = [pair for i, pair in enumerate(pairs) for _ in range(i % 3)]
    ours, theirs = (asdict(reward_model.report(model, side, side)) for side in (weighed, repeated))
    assert (ours.pop("pairs"), theirs.pop("pairs")) == (26, 39)
    assert (ours.pop("equal_pairs"), theirs.pop("equal_pairs")) == pytest.approx((39**2 / (13 + 13 * 4), 39))
    assert ours == pytest.approx(theirs, rel=1e-2), "but for the weak prior of the lengths' slope"
    with pytest.raises(CannotLearn, match="left to measure"):
        reward_model.report(model, [replace(pair, weight=0.0) for pair in pairs], pairs)


def test_one_loud_account_that_training_caps_does_not_make_the_lengths_hard_to_beat() -> None:
    """4,000 of 5,000 votes are for the longer answer, and weigh a tenth of all."""
    rng = random.Random(0)
    worth: dict[Answer, float] = {}

    def vote(loud: bool, weight: float) -> Pair:
        answers = [Answer((1,), tuple(rng.sample(range(10**6), rng.randint(5, 40))), True) for _ in range(2)]
        worth.update({answer: rng.gauss(0, 1.5) for answer in answers})
        liked = sorted(answers, key=len if loud else lambda answer: worth[answer] + rng.gauss(0, 1.5))
        return Pair(liked[1], liked[0], weight=weight)

    class Crowds:
        def rewards(self, answers: Sequence[Answer]) -> torch.Tensor:
            return torch.tensor([[worth[answer]] for answer in answers])

    votes = [vote(False, 1.0) for _ in range(1000)] + [vote(True, 1 / 36) for _ in range(4000)]
    report = reward_model.report(Crowds(), votes, votes)  # type: ignore[arg-type]
    assert report.accuracy > 0.7 > 0.6 > report.length_accuracy
    assert report.pairs == 5000
    assert report.equal_pairs < 1300
    figures = {f"reward_{name}": figure for name, figure in asdict(report).items()}
    assert next(check for check in gate.judge(figures, GateSettings()).checks if check.name == "reward_model").passed


def test_votes_that_prefer_nothing_end_with_a_sentence(tiny_backbone: MakeBackbone) -> None:
    pair = make_pairs(1)[0]
    with pytest.raises(CannotLearn, match="collect votes"):
        reward_model.train(
            tiny_backbone(), "reward", [Pair(pair.chosen, pair.rejected, tie=True)], RewardConfig(),
            accelerator=Accelerator(),
        )  # fmt: skip


def test_a_model_that_says_the_same_of_everything_ends_with_a_sentence(tiny_backbone: MakeBackbone) -> None:
    model = RewardModel(tiny_backbone(), "reward", heads=1)
    with pytest.raises(CannotLearn, match="the same of every answer"):
        model.normalise([make_pairs(1)[0].chosen] * 5)


def test_batches_hold_every_pair_once_and_pairs_of_like_length() -> None:
    pairs = make_pairs(300)
    batches = reward_model.batches_by_length(pairs, 16, torch.Generator().manual_seed(0))
    assert sorted(map(id, (p for b in batches for p in b))) == sorted(map(id, pairs))
    within = sum(max(map(len, b)) - min(map(len, b)) for b in batches) / len(batches)
    assert within < 0.3 * (max(map(len, pairs)) - min(map(len, pairs)))

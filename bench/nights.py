"""Nights without days: the loop of votes, reward model and PPO on the trainer's own code, without HTTP and vLLM.

A `Lab` holds the starter model. One round of the loop:

    votes = lab.day(1000, crowd)                    pairs by the base or by "policy", and what people say of them
    night = lab.night(lab.prepare(votes))           a reward model and a new "policy", as trainer.job makes them
    lab.win_rate(held_out), lab.probes()            gold's word on "policy" beside the base, and what it still knows

After a night the adapter "policy" is the new policy, until the next one begins: the next day's pairs may be drawn from
it. Votes are dicts as the record's export yields them. Everything is repeatable by seed, on one kind of processor.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoTokenizer

from bench.gold import worth
from bench.personas import Persona, Shown
from data import probes
from data.settings import STARTER, TrainingSettings
from data.stats import wilson
from data.trusted import TrustedPair
from trainer import dialogues, ppo, reward_model
from trainer.backbone import Backbone
from trainer.dialogues import Prompt
from trainer.encoding import Answer, ChatFormat
from trainer.measure import log_ratios
from trainer.ppo import PPOConfig
from trainer.preferences import Preferences, Split, prepare
from trainer.reward_model import RewardConfig, RewardModel
from trainer.rollout import LocalSampler, Sampling

MAX_TOKENS = 64
"""An answer is cut off there; one in a thousand is."""
SAMPLES_TO_NORMALISE = 256

CHUNK = 250
"""Prompts for which pairs are drawn at a time. The same chunk of the same policy is the same pairs, so that what more
votes are worth is not blurred by other pairs."""

Scores = Callable[[Sequence[Answer]], Tensor]


@dataclass(frozen=True, slots=True)
class Asked:
    """Two different answers to one prompt, in the order in which they are shown."""

    prompt: Prompt
    first: Answer
    second: Answer
    kind: str = "same_policy"


@dataclass(frozen=True, slots=True)
class Night:
    """What a night made, beside the adapters "reward" and "policy"."""

    reward: RewardModel
    curve: list[dict[str, float]]
    """PPO's figures, a row a step."""


def cast(
    pairs: Sequence[Asked], crowd: Sequence[Persona], *, chat: ChatFormat, policy: str = "base", first: int = 0
) -> list[dict[str, Any]]:
    """One vote on each pair, as `data.comparisons.export_preferences` yields it. The people take turns; who skips a
    pair leaves it to the next.

    Args:
        policy: who is said to have written the answers.
        first: the number of the first vote; numbers make ids and conversations.
    """
    turns = cycle(crowd)
    votes = []
    for number, pair in enumerate(pairs, start=first):
        shown = [Shown(chat.text(answer), answer.finished) for answer in (pair.first, pair.second)]
        choice, voter = None, None
        for _ in range(20 * len(crowd)):
            voter = next(turns)
            choice = voter.decides(pair.prompt, *shown).choice
            if choice is not None:
                break
        else:
            raise ValueError("nobody in this crowd votes")
        chosen, rejected = reversed(shown) if choice == "b" else shown
        votes.append(
            {
                "vote": f"vote_{number:06d}",
                "comparison": f"cmp_{number:06d}",
                "voter": voter.name,
                "user": voter.name,
                "conversation": f"conversation-{number:06d}",
                "prompt": list(pair.prompt.messages),
                "chosen": [{"role": "assistant", "content": chosen.text}],
                "rejected": [{"role": "assistant", "content": rejected.text}],
                "choice": str(choice),
                "kind": pair.kind,
                "chosen_policy": policy,
                "rejected_policy": policy,
                "chosen_finish_reason": "stop" if chosen.finished else "length",
                "rejected_finish_reason": "stop" if rejected.finished else "length",
            }
        )
    return votes


class Lab:
    def __init__(self, *, seed: int, compiled: bool = False) -> None:
        """
        Args:
            seed: of everything that is drawn here. Two labs of one seed do the same.
            compiled: for many nights in one process: 1.4 times as fast after a minute or two of compilation, and the
                same but for rounding. Without a C++ compiler nothing is compiled.
        """
        torch.set_flush_denormal(True)  # as `python -m trainer` does
        torch.manual_seed(seed)
        self.seed = seed
        self.backbone = Backbone.load(STARTER)
        self.machine = torch.backends.cpu.get_cpu_capability()
        """What the rounding depends on: the kind of processor, and whether layers are compiled."""
        if "amx_bf16" in Path("/proc/cpuinfo").read_text():
            self.machine += ", AMX"
        if compiled and shutil.which("g++"):
            _compile(self.backbone)
            self.machine += ", compiled"
        self.chat = ChatFormat(AutoTokenizer.from_pretrained(STARTER), self.backbone.end_ids)
        self.sampling = Sampling(max_tokens=MAX_TOKENS, end_ids=self.backbone.end_ids)
        self.accelerator = Accelerator()
        self.trusted = trusted_pairs()
        self._of_the_base: dict[object, list[Answer]] = {}

    # Days ------------------------------------------------------------------------------------------------------

    def day(
        self,
        count: int,
        crowd: Sequence[Persona],
        *,
        earlier: Sequence[dict[str, Any]] = (),
        adapter: str | None = None,
        pairs: Callable[[Sequence[Prompt], int], list[Asked]] | None = None,
    ) -> list[dict[str, Any]]:
        """Votes, `earlier` ones included, until there are `count` of them; no prompt comes twice.

        Args:
            adapter: who answers; None for the base.
            pairs: what draws a chunk's pairs, called with its prompts and the number of its first draw, of five; by
                default random pairs of `adapter`.
        """
        votes = list(earlier)
        # Conversations are numbered by the prompt.
        chunk = int(votes[-1]["conversation"].rpartition("-")[2]) // CHUNK + 1 if votes else 0
        while len(votes) < count:
            prompts = dialogues.prompts((chunk + 1) * CHUNK, seed=self.seed, held_out=False)[chunk * CHUNK :]
            draw = 10 + 5 * chunk
            asked = pairs(prompts, draw) if pairs else self.random_pairs(prompts, adapter=adapter, draw=draw)
            votes += cast(asked, crowd, chat=self.chat, policy=adapter or "base", first=chunk * CHUNK)
            chunk += 1
        return votes[:count]

    def answers(self, prompts: Sequence[Prompt], *, adapter: str | None = None, draw: int) -> list[Answer]:
        """One answer to each. The same `draw` gives the same answer to the i-th prompt, however many there are."""
        first = (self.seed * 1000 + draw) * 1_000_000
        queries = [self.chat.query(p.messages) for p in prompts]
        sample = LocalSampler(self.backbone, adapter, self.sampling)
        drawn = partial(sample, queries, range(first, first + len(prompts)))
        if adapter is not None:
            return drawn()
        # The base never changes, and every cell of a seed asks it the same.
        asked = draw, tuple(queries)
        if asked not in self._of_the_base:
            self._of_the_base[asked] = drawn()
        return list(self._of_the_base[asked])

    def random_pairs(self, prompts: Sequence[Prompt], *, adapter: str | None = None, draw: int) -> list[Asked]:
        """Two answers to each prompt by `adapter` (None: the base), on random sides. Where both are the same nobody is
        asked, so there may be fewer pairs than prompts."""
        firsts, seconds = (self.answers(prompts, adapter=adapter, draw=draw + i) for i in (0, 1))
        return self._shown(prompts, firsts, seconds, "same_policy", draw)

    def active_pairs(
        self, prompts: Sequence[Prompt], reward: RewardModel, *, adapter: str | None = None, draw: int
    ) -> list[Asked]:
        """Beside a first answer, of three others the one on which the reward model's heads disagree most with it: the
        variance over heads of the difference of scores, as the service chooses."""
        drawn = [self.answers(prompts, adapter=adapter, draw=draw + i) for i in range(4)]
        rewards = torch.stack([reward.rewards(answers) for answers in drawn])  # (4, N, K)
        disagreement = (rewards[1:] - rewards[0]).var(dim=2)  # (3, N)
        best = disagreement.argmax(dim=0).tolist()
        seconds = [drawn[1 + best[i]][i] for i in range(len(prompts))]
        return self._shown(prompts, drawn[0], seconds, "active", draw)

    def _shown(
        self, prompts: Sequence[Prompt], firsts: Sequence[Answer], seconds: Sequence[Answer], kind: str, draw: int
    ) -> list[Asked]:
        sides = torch.rand(len(prompts), generator=torch.Generator().manual_seed(self.seed * 1000 + draw)) < 0.5
        pairs = []
        for prompt, one, two, swapped in zip(prompts, firsts, seconds, sides.tolist(), strict=True):
            if self.chat.text(one) != self.chat.text(two):
                pairs.append(Asked(prompt, two, one, kind) if swapped else Asked(prompt, one, two, kind))
        return pairs

    # Nights ----------------------------------------------------------------------------------------------------

    def prepare(self, votes: Sequence[dict[str, Any]], **settings: Any) -> Preferences:
        """Split and weigh votes as a run does, but for the raters: nobody is left out, and all are equally reliable
        (`bench.robust` has both).

        Args:
            settings: fields of TrainingSettings other than its defaults.
        """
        training = TrainingSettings(**settings)
        return prepare(
            [vote for vote in votes if vote["choice"] != "both_bad"],
            self.trusted,
            self.chat,
            rater_share=training.max_rater_share,
            uncapped_votes=training.uncapped_votes,
            trusted_weight=training.trusted_weight,
            max_prompt_tokens=training.max_prompt_tokens,
            max_answer_tokens=training.max_answer_tokens,
        )

    def reward(
        self,
        preferences: Preferences,
        config: RewardConfig,
        *,
        adapter: str = "reward",
        split: Split = Split.TRAIN,
    ) -> RewardModel:
        """A reward model of the votes on one side, on the scale of the base's own answers."""
        model = reward_model.train(
            self.backbone, adapter, preferences.pairs[split], config, accelerator=self.accelerator
        )
        queries = preferences.queries[Split.TRAIN][-SAMPLES_TO_NORMALISE:]
        model.normalise(LocalSampler(self.backbone, None, self.sampling)(queries, range(len(queries))))
        return model

    def improve(
        self,
        reward: RewardModel,
        preferences: Preferences,
        config: PPOConfig,
        *,
        score: Scores | None = None,
        start_from: str = "base",
    ) -> Night:
        """PPO on the prompts of the votes, always at a price of KL from the base.

        Args:
            score: what PPO maximises, where it is not `reward.score`.
            start_from: "base", or "incumbent" for the adapter "policy" as it stands.
        """
        if start_from == "base":
            self.backbone.adapters.add("policy")
        curve: list[dict[str, float]] = []
        ppo.learn(
            self.backbone,
            reward.value_start("value"),
            preferences.queries[Split.TRAIN],
            LocalSampler(self.backbone, "policy", self.sampling),
            score or reward.score,
            config,
            accelerator=self.accelerator,
            on_step=lambda step, figures: curve.append(figures),
        )
        return Night(reward, curve)

    def night(
        self,
        preferences: Preferences,
        *,
        reward: RewardConfig | None = None,
        policy: PPOConfig | None = None,
        start_from: str = "base",
    ) -> Night:
        """A reward model from all votes, and PPO against it."""
        model = self.reward(preferences, reward or RewardConfig(seed=self.seed))
        config = policy or PPOConfig(seed=self.seed)
        return self.improve(model, preferences, config, start_from=start_from)

    # Mornings --------------------------------------------------------------------------------------------------

    def gold(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Tensor:
        """(N,) what the answers are worth, before scaling."""
        return torch.tensor(
            [worth(p, self.chat.text(a), finished=a.finished) for p, a in zip(prompts, answers, strict=True)]
        )

    def win_rate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Gold's word on the policy's answers beside the base's, ties counting half, and the KL from the base, in nats
        an answer."""
        answers = self.answers(prompts, adapter="policy", draw=900)
        kl = float(log_ratios(self.backbone, answers, temperature=1.0).mean())
        return self.compare(prompts, answers) | {"kl": kl}

    def best_of(self, n: int, prompts: Sequence[Prompt], score: Scores) -> dict[str, float]:
        """The same for the best of n answers of the base by these scores."""
        drawn = [self.answers(prompts, draw=910 + i) for i in range(n)]
        best = torch.stack([score(answers) for answers in drawn]).argmax(dim=0).tolist()
        return self.compare(prompts, [drawn[best[i]][i] for i in range(len(prompts))])

    def compare(self, prompts: Sequence[Prompt], ours: Sequence[Answer]) -> dict[str, float]:
        theirs = self.answers(prompts, draw=901)
        gold_ours, gold_theirs = self.gold(prompts, ours), self.gold(prompts, theirs)
        ties = float((gold_ours == gold_theirs).float().mean())
        share = float((gold_ours > gold_theirs).float().mean()) + ties / 2
        low, high = wilson(share * len(prompts), len(prompts))
        return {
            "win_rate": share,
            "win_rate_low": low,
            "win_rate_high": high,
            "ties": ties,
            "gold": float(gold_ours.mean()),
            "gold_base": float(gold_theirs.mean()),
            "length": sum(len(a.response) for a in ours) / len(ours),
            "length_base": sum(len(a.response) for a in theirs) / len(theirs),
            "finished": sum(a.finished for a in ours) / len(ours),
        }

    def accuracy(self, reward: RewardModel, pairs: Sequence[Asked]) -> float:
        """The share of pairs that the reward model puts in gold's order; those that gold calls equal are left out."""
        prompts = [pair.prompt for pair in pairs]
        firsts, seconds = [pair.first for pair in pairs], [pair.second for pair in pairs]
        differences = self.gold(prompts, firsts) - self.gold(prompts, seconds)
        scores = reward.score(firsts) - reward.score(seconds)
        return float((differences * scores > 0)[differences != 0].float().mean())

    def probes(self, *, adapter: str | None = "policy", draws: int = 8) -> dict[str, float]:
        """The shares of the frozen probes of each kind answered right, at temperature 1."""
        sample = LocalSampler(self.backbone, adapter, self.sampling)
        shares: dict[str, float] = {}
        for kind in probes.KINDS:
            asked = probes.load(kind) * draws
            first = (self.seed * 1000 + 990) * 1_000_000
            answers = sample([self.chat.query(p.messages) for p in asked], range(first, first + len(asked)))
            right = [probes.is_right(p, self.chat.text(a)) for p, a in zip(asked, answers, strict=True)]
            shares[kind] = sum(right) / len(right)
        return shares


def _compile(backbone: Backbone) -> None:
    """Compile the layers, but not for sampling: a cache of keys and values makes a variant of each layer and length."""
    # A variant for each adapter, with and without gradients, with and without a mask.
    torch._dynamo.config.recompile_limit = 64
    for layer in backbone.base.get_decoder().layers:
        plain, fast = layer.forward, torch.compile(layer.forward, dynamic=True)

        def forward(*args: Any, plain: Any = plain, fast: Any = fast, **kwargs: Any) -> Any:
            return (fast if kwargs.get("past_key_values") is None else plain)(*args, **kwargs)

        layer.forward = forward


def trusted_pairs() -> list[TrustedPair]:
    """What comes with the starter model."""
    records = map(json.loads, (STARTER / "trusted.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        TrustedPair(f"pair_{i:04d}", r["prompt"], r["chosen"][0]["content"], r["rejected"][0]["content"])
        for i, r in enumerate(records)
    ]

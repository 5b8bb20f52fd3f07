"""THE MAIN PATH: votes -> reward model -> PPO -> a candidate in the registry.

    claim      take the queued run
    prepare    votes and trusted pairs to weighed, split pairs
    reward     fit the reward model, and a judge on votes it has not seen
    improve    PPO against the reward model, up to the KL budget
    measure    candidate beside reference on held-out prompts and the frozen probes
    publish    the adapter folder, whole or not at all, and the candidate's row

Whatever goes wrong, the run ends as failed with a sentence that says what to do, and the policy that serves is
untouched: it is read here, and never written.
"""

import errno
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from sqlite_utils import Database
from torch import nn
from transformers import AutoTokenizer

from data import comparisons, learning, registry, runs, trusted
from data.database import connect, transaction
from data.ids import new_id
from data.settings import Settings
from data.types import BASE_POLICY, Policy, PolicyStatus, Run, RunStatus, timestamp
from trainer import ppo, reward_model
from trainer.backbone import Backbone
from trainer.encoding import ChatFormat
from trainer.keeper import Cancelled, Keeper
from trainer.measure import measure, probe
from trainer.ppo import PPOConfig
from trainer.preferences import Preferences, Split, prepare
from trainer.reward_model import RewardConfig, RewardModel
from trainer.rollout import EngineError, LocalSampler, Sampling
from trainer.updates import CannotLearn

Watch = Callable[[str, int, int, dict[str, float]], None]
"""Told of every step: stage, step, how many there are at most, and the step's figures."""

EXPECTED = (CannotLearn, EngineError, registry.RegistryError, MemoryError, OSError, torch.OutOfMemoryError)
"""What can go wrong without the trainer being at fault."""

PROMPTS_MEASURED = 256
SAMPLES_TO_NORMALISE = 256


def once(settings: Settings, *, watch: Watch = lambda stage, step, steps, figures: None) -> Run | None:
    """Claim the queued run and carry it to its end; None when nothing is queued."""
    db = connect(settings.database)
    with transaction(db):
        runs.give_up_the_dead(db)
        run = runs.claim(db)
    if run is None:
        return None
    with Keeper(settings.database, run.id) as keeper:
        try:
            _Night(settings, db, run, keeper, watch).learn()
        except (Cancelled, KeyboardInterrupt):
            keeper.finish(RunStatus.CANCELLED)
        except runs.RunLost:
            pass  # it was given up for dead: another run may be under way, and nothing of this one is in use
        except Exception as error:
            keeper.finish(RunStatus.FAILED, error=what_to_do(error))
            if not isinstance(error, EXPECTED):
                raise
        else:
            keeper.finish(RunStatus.SUCCEEDED)
    run = runs.get(db, run.id)
    db.close()
    return run


def what_to_do(error: Exception) -> str:
    """One sentence for the operator."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full: make room in the state folder, then start another run."
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "Out of memory: lower microbatch_tokens in training.ppo and in training.reward."
    if isinstance(error, EXPECTED):
        return str(error)
    return f"A fault in the trainer ({type(error).__name__}: {error}): please report it with the log."


@dataclass(frozen=True, slots=True)
class _Night:
    settings: Settings
    db: Database
    run: Run
    keeper: Keeper
    watch: Watch

    def learn(self) -> None:
        backbone, chat = self._load()
        preferences = self._prepare(chat)
        reward, judge, reports = self._fit(backbone, preferences)
        stopped = self._improve(backbone, reward, preferences)
        figures = self._measure(backbone, chat, judge, preferences)
        self._publish(backbone, reward, reports, figures | reports | {"stopped_at_kl_budget": stopped})

    def _load(self) -> tuple[Backbone, ChatFormat]:
        self._stage("loading the model")
        training = self.settings.training
        backbone = Backbone.load(self.settings.model, rank=training.rank, alpha=training.alpha, bf16=training.bf16)
        return backbone, ChatFormat(AutoTokenizer.from_pretrained(self.settings.model), backbone.end_ids)

    def _prepare(self, chat: ChatFormat) -> Preferences:
        self._stage("preparing votes")
        training = self.settings.training
        preferences = prepare(
            comparisons.export_preferences(self.db),
            trusted.list_pairs(self.db),
            chat,
            rater_share=training.max_rater_share,
            uncapped_votes=training.uncapped_votes,
            trusted_weight=training.trusted_weight,
            max_prompt_tokens=training.max_prompt_tokens,
            max_answer_tokens=training.max_answer_tokens,
        )
        decisive = sum(v.split is Split.TRAIN and v.choice != "tie" for v in preferences.votes)
        if decisive < training.min_votes:
            raise CannotLearn(
                f"{decisive} votes to train on, and training.min_votes is {training.min_votes}: collect more votes."
            )
        for split in (Split.JUDGE, Split.HELD_OUT):
            if all(pair.tie for pair in preferences.pairs[split]):
                raise CannotLearn(f"No vote on the {split} side prefers an answer: collect more votes.")
        with transaction(self.db):
            used = ((v.vote, v.choice, v.split, v.weight) for v in preferences.votes)
            learning.record_votes(self.db, self.run.id, used)
        return preferences

    def _fit(self, backbone: Backbone, preferences: Preferences) -> tuple[RewardModel, RewardModel, dict[str, Any]]:
        config = RewardConfig(**self._config("reward"))
        samples = LocalSampler(backbone, None, self._sampling(backbone, 1.0))
        queries = preferences.queries[Split.TRAIN][:SAMPLES_TO_NORMALISE]
        reference = samples(queries, range(len(queries)))
        models, reports = [], {}
        for adapter, split in (("reward", Split.TRAIN), ("judge", Split.JUDGE)):
            self._stage(adapter)
            pairs = preferences.pairs[split]
            steps = config.epochs * -(-len(pairs) // config.batch)
            model = reward_model.train(
                backbone, adapter, pairs, config, accelerator=Accelerator(), on_step=self._on_step(adapter, steps)
            )
            model.normalise(reference)
            reports[adapter] = asdict(reward_model.report(model, preferences.pairs[Split.HELD_OUT], pairs))
            models.append(model)
        return models[0], models[1], reports

    def _improve(self, backbone: Backbone, reward: RewardModel, preferences: Preferences) -> bool:
        self._stage("ppo")
        config = PPOConfig(**self._config("ppo"))
        backbone.adapters.add("policy")
        if self.settings.training.start_from == "incumbent":
            incumbent = registry.serving(self.db)
            if incumbent is not None and incumbent.name != BASE_POLICY:
                backbone.adapters.load("policy", registry.checked_folder(self.settings.state, incumbent))
        head: nn.Linear = reward.value_start("value")
        return ppo.learn(
            backbone,
            head,
            preferences.queries[Split.TRAIN],
            LocalSampler(backbone, "policy", self._sampling(backbone, config.temperature)),
            reward.score,
            config,
            accelerator=Accelerator(),
            on_step=self._on_step("ppo", config.steps),
        )

    def _measure(
        self, backbone: Backbone, chat: ChatFormat, judge: RewardModel, preferences: Preferences
    ) -> dict[str, Any]:
        self._stage("measuring")
        sampling = self._sampling(backbone, PPOConfig(**self._config("ppo")).temperature)
        queries = preferences.queries[Split.HELD_OUT][:PROMPTS_MEASURED]
        seed = self.settings.training.seed
        return {
            "candidate": asdict(measure(backbone, judge.score, queries, sampling, seed=seed)),
            "probes": probe(backbone, "policy", chat, sampling, seed=seed),
            "ref_probes": probe(backbone, None, chat, sampling, seed=seed),
        }

    def _publish(
        self, backbone: Backbone, reward: RewardModel, reports: dict[str, Any], metrics: dict[str, Any]
    ) -> None:
        self._stage("publishing")
        state = self.settings.state
        reward_id = new_id("rm")
        path, sha256 = registry.publish_folder(state, reward_id, reward.save, parent="reward_models")
        row = learning.RewardModelRow(reward_id, self.run.id, path, sha256, reports["reward"])
        parent = registry.serving(self.db) or registry.ensure_base_policy(self.db, state, Path(self.settings.model))
        name = registry.next_name(self.db)
        path, sha256 = registry.publish_folder(state, name, lambda folder: backbone.publish("policy", folder))
        candidate = Policy(
            name, parent.name, path, sha256, parent.base_model,
            PolicyStatus.CANDIDATE, timestamp(), self.run.id, reward_id, metrics,
        )  # fmt: skip
        with transaction(self.db):
            learning.insert_reward_model(self.db, row)
            registry.insert(self.db, candidate)

    def _sampling(self, backbone: Backbone, temperature: float) -> Sampling:
        return Sampling(
            max_tokens=self.settings.training.max_answer_tokens, temperature=temperature, end_ids=backbone.end_ids
        )

    def _config(self, section: str) -> dict[str, Any]:
        """The settings' fields of a config, under what the run itself asks for."""
        given: dict[str, Any] = getattr(self.settings.training, section) | self.run.config.get(section, {})
        seed = self.run.config.get("seed", self.settings.training.seed)
        return {"seed": seed} | given

    def _stage(self, name: str) -> None:
        self.keeper.stage(name)
        self.watch(name, 0, 0, {})

    def _on_step(self, stage: str, steps: int) -> Callable[[int, dict[str, float]], None]:
        def on_step(step: int, figures: dict[str, float]) -> None:
            self.keeper.figures(step, figures)
            self.watch(stage, step + 1, steps, figures)

        return on_step

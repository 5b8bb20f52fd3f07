"""THE MAIN PATH: votes -> reward model -> PPO -> a candidate in the registry.

    claim      take the queued run, and clear away what a run that was killed left behind
    raters     how far each rater's votes can be relied on, and whose are left out
    prepare    votes and trusted pairs to weighed, split pairs
    reward     fit the reward model, and a judge on votes it has not seen
    improve    PPO against the reward model, up to the KL budget; between steps, wait while chat is busy
    measure    candidate beside incumbent on held-out prompts and the frozen probes
    gate       hold every figure against its threshold: candidate, rejected, or (gate.mode = "offline") promoted
    publish    the adapter folder, whole or not at all, and the candidate's row

Whatever goes wrong, the run ends as failed with a sentence that says what to do, and the policy that serves is
untouched: it is read here, and never written. A run whose candidate the gate rejects has done its work and succeeded.
"""

import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database
from torch import nn
from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from data import comparisons, learning, probes, raters, registry, runs, trusted
from data.database import connect, transaction
from data.ids import new_id
from data.settings import Settings
from data.types import BASE_POLICY, Policy, PolicyStatus, Run, RunStatus, timestamp
from trainer import consensus, gate, ppo, reward_model
from trainer.backbone import Backbone
from trainer.encoding import ChatFormat
from trainer.gate import GateReport
from trainer.keeper import Cancelled, Keeper
from trainer.measure import log_ratios, measure, probe
from trainer.ppo import PPOConfig
from trainer.preferences import Preferences, Split, prepare, usable
from trainer.raters import standings
from trainer.reward_model import RewardConfig, RewardModel
from trainer.rollout import Engine, EngineError, EngineSampler, LocalSampler, Sampler, Sampling, forget_leftovers
from trainer.updates import CannotLearn

Watch = Callable[[str, int, int, dict[str, float]], None]
"""Told of every step: stage, step, how many there are at most, and the step's figures."""

C = TypeVar("C", RewardConfig, PPOConfig)

PROMPTS_MEASURED = 256
SAMPLES_TO_NORMALISE = 256
FEWEST_SAMPLES = 100


def once(
    settings: Settings,
    *,
    request: dict[str, Any] | None = None,
    run_id: str | None = None,
    watch: Watch = lambda stage, step, steps, figures: None,
) -> Run | None:
    """Claim a run and carry it to its end.

    Args:
        request: ask for a run with this config first; None: take the one in the queue.
        run_id: take this one alone: by the time that torch is imported another may be in its place.

    Returns:
        The run as it ended; None where there is none in the queue, or not this one.

    Raises:
        RunActive: a run was to be asked for, and there is one.
    """
    with closing(connect(settings.database)) as db:
        with transaction(db):
            if request is not None:
                runs.request(db, requested_by="cli", config=request)
            run = runs.claim(db, run_id)
        if run is None:
            return None
        with Keeper(settings.database, run.id) as keeper:
            try:
                _Night(settings, db, run, keeper, watch, find_engines(settings)).learn()
            except (Cancelled, KeyboardInterrupt):
                keeper.finish(RunStatus.CANCELLED)
            except runs.RunLost:
                pass  # it was given up for dead: another run may be under way, and nothing of this one is in use
            except Exception as error:
                sentence = what_to_do(error)
                if sentence is None:
                    traceback.print_exc()
                    sentence = f"A fault in the trainer ({type(error).__name__}: {error}): please report it."
                keeper.finish(RunStatus.FAILED, error=sentence)
        return runs.get(db, run.id)


def what_to_do(error: Exception) -> str | None:
    """One sentence for the operator; None where the trainer itself is at fault."""
    said = str(error)
    if any(words in said for words in ("No space left on device", "disk is full", "Disk quota exceeded")):
        return "The disk is full: make room in the state folder, then start another run."
    if isinstance(error, torch.OutOfMemoryError):  # a GPU's
        return (
            "Out of memory on the GPU: lower microbatch_tokens in training.ppo and in training.reward, or, if vLLM runs"
            " on the same GPU, engine.gpu_memory_share, and start `nightshift up` again."
        )
    if isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said:
        return (
            "Out of memory: lower microbatch_tokens in training.ppo and in training.reward and, where prompts are long,"
            " training.max_prompt_tokens."
        )
    if isinstance(error, EngineError):
        return f'{said}. Start another run when the engine is well, or set training.rollouts = "local".'
    if isinstance(error, sqlite3.OperationalError):
        return f"The record cannot be written ({said}): see what `nightshift doctor` says, then start another run."
    if isinstance(error, CannotLearn | registry.RegistryError | OSError):
        return said
    return None


def find_engines(settings: Settings) -> list[Engine]:
    """The vLLMs that chat uses: those named, or the one that `nightshift up` started on this state folder."""
    if settings.engine.urls:
        return [Engine(url, settings.engine.api_key) for url in settings.engine.urls]
    try:
        return [Engine(**json.loads((settings.state / "engine.json").read_text()))]
    except FileNotFoundError:
        return []


@dataclass(frozen=True, slots=True)
class _Night:
    settings: Settings
    db: Database
    run: Run
    keeper: Keeper
    watch: Watch
    engines: list[Engine]
    """All of them answer people; the first also samples for PPO."""

    def learn(self) -> None:
        self._clear_away()
        backbone, chat = self._load()
        incumbent = self._load_incumbent(backbone)
        sample = self._sampler(backbone)
        preferences = self._prepare(chat, self._rate(backbone, chat))
        reward, judge, reports = self._fit(backbone, preferences)
        stopped = self._improve(backbone, reward, preferences, sample, incumbent)
        figures = self._measure(backbone, chat, judge, preferences, incumbent)
        verdict = self._gate(figures, reports)
        metrics = figures | reports | {"stopped_at_kl_budget": stopped, "gate": verdict.as_dict()}
        self._publish(backbone, reward, metrics, verdict, incumbent)

    def _clear_away(self) -> None:
        """Only one run is active, so what lies under a temporary name or has no row is that of a dead one."""
        self._stage("clearing away")
        state = self.settings.state
        forget_leftovers(state / "rollouts", self.engines[0] if self.engines else None)
        known = {row.path for row in learning.reward_models(self.db)}
        left = [path for path in state.glob("reward_models/rm_*") if path.relative_to(state).as_posix() not in known]
        left += [*state.glob("reward_models/.rm_*.building"), *state.glob("policies/.policy-*.building")]
        for folder in left:
            shutil.rmtree(folder)
        self.keeper.set_room_aside()

    def _load(self) -> tuple[Backbone, ChatFormat]:
        self._stage("loading the model")
        training, model = self.settings.training, self.settings.model
        try:
            config = cached_file(model, "config.json", local_files_only=True)  # the hub may be far, or nowhere
        except OSError as error:
            raise CannotLearn(
                f"{model} is no model folder, and not in this machine's cache of the Hugging Face hub: `nightshift up"
                f" --model {model}` downloads it."
            ) from error
        # Raises where the votes and policies are another model's.
        registry.ensure_base_policy(self.db, self.settings.state, Path(str(config)).parent)
        try:
            backbone = Backbone.load(model, rank=training.rank, alpha=training.alpha, bf16=training.bf16)
            return backbone, ChatFormat(AutoTokenizer.from_pretrained(model), backbone.end_ids)
        except ValueError as error:
            raise CannotLearn(f"{model} cannot be trained: {error}") from error

    def _load_incumbent(self, backbone: Backbone) -> Policy:
        """The policy that serves, which the candidate would replace, as the adapter "incumbent" unless it is the base
        model. Before the work begins: it is where a run fails whose settings do not fit what serves."""
        incumbent = registry.serving(self.db) or registry.get(self.db, BASE_POLICY)
        if incumbent.name == BASE_POLICY:
            return incumbent
        folder = registry.checked_folder(self.settings.state, incumbent)
        try:
            backbone.adapters.load("incumbent", folder)
        except ValueError as error:
            raise CannotLearn(
                f"{incumbent.name}, which serves, cannot be compared with ({error}): set training.rank to what it was,"
                f" or more, or put {BASE_POLICY} into service first."
            ) from error
        return incumbent

    def _sampler(self, backbone: Backbone) -> Sampler:
        """Who writes the answers that PPO learns from, as `training.rollouts` says."""
        wanted = self.settings.training.rollouts
        sampling = self._sampling(backbone, self._ppo_config.temperature)
        local = LocalSampler(backbone, "policy", sampling)
        if wanted == "local" or (wanted == "auto" and backbone.device.type != "cuda"):
            return local
        try:
            if not self.engines:
                raise EngineError("No running vLLM is known: start `nightshift up`, or name one in engine.urls")
            self.engines[0].check()
        except EngineError:
            if wanted == "auto":
                return local
            raise
        return EngineSampler(
            backbone, "policy", sampling, engine=self.engines[0], home=self.settings.state / "rollouts",
            name=f"rollout-{self.run.id}", accelerator=Accelerator(), sleep=self.keeper.sleep,
        )  # fmt: skip

    def _rate(self, backbone: Backbone, chat: ChatFormat) -> dict[str, float]:
        """How far each rater's votes can be relied on; whose votes are left out is in the record then."""
        self._stage("raters")
        training = self.settings.training
        votes = usable(
            comparisons.export_preferences(self.db),
            chat,
            max_prompt_tokens=training.max_prompt_tokens,
            max_answer_tokens=training.max_answer_tokens,
        )
        distrusted = raters.left_out(self.db)
        judged = consensus.judge(
            backbone, votes, distrusted=distrusted, at_least=training.min_votes // 2,
            on_step=lambda step, steps: self._on_step("raters", steps)(step, {}),
        )  # fmt: skip
        found = standings(judged, raters.gold_answers(self.db), distrusted=distrusted)
        with transaction(self.db):
            raters.keep(self.db, self.run.id, found, frees=consensus.is_one(judged))
        released = raters.released(self.db)
        return {voter: standing.reliability for voter, standing in found.items() if voter not in released}

    def _prepare(self, chat: ChatFormat, reliability: dict[str, float]) -> Preferences:
        self._stage("preparing votes")
        training = self.settings.training
        cast = [record for record in comparisons.export_preferences(self.db) if record["choice"] != "both_bad"]
        left_out = raters.left_out(self.db)
        ranked = [record for record in cast if record["voter"] not in left_out]
        preferences = prepare(
            ranked,
            trusted.list_pairs(self.db),
            chat,
            rater_share=training.max_rater_share,
            uncapped_votes=training.uncapped_votes,
            trusted_weight=training.trusted_weight,
            max_prompt_tokens=training.max_prompt_tokens,
            max_answer_tokens=training.max_answer_tokens,
            reliability=reliability,
        )
        decisive = sum(v.split is Split.TRAIN and v.choice != "tie" for v in preferences.votes)
        if decisive < training.min_votes:
            too_long, distrusted = len(ranked) - len(preferences.votes), len(cast) - len(ranked)
            raise CannotLearn(
                f"{decisive} votes to train on, and training.min_votes is {training.min_votes}: collect more votes"
                + (f", or raise training.max_prompt_tokens and training.max_answer_tokens, beyond which {too_long} lie"
                   if too_long else "")
                + (f", or release some of {distrusted} that are left out: `nightshift raters list` says why."
                   if distrusted else ".")
            )  # fmt: skip
        sides = {v.choice for v in preferences.votes} - {"tie"}
        if len(sides) == 1:
            raise CannotLearn(
                f"Every vote is for the answer shown as '{sides.pop()}', though sides are drawn by chance: these votes"
                " say nothing about answers. See who cast them with `nightshift votes list`."
            )
        if all(pair.tie for pair in preferences.pairs[Split.JUDGE]):
            raise CannotLearn(f"No vote on the {Split.JUDGE} side prefers an answer: collect more votes.")
        if not any(pair.measures for pair in preferences.pairs[Split.HELD_OUT]):
            raise CannotLearn(
                f"No vote on the {Split.HELD_OUT} side prefers an answer of a pair that was drawn by chance: collect"
                " more votes, or lower comparisons.active_share."
            )
        with transaction(self.db):
            used = ((v.vote, v.choice, v.split, v.weight) for v in preferences.votes)
            learning.record_votes(self.db, self.run.id, used)
        return preferences

    def _fit(self, backbone: Backbone, preferences: Preferences) -> tuple[RewardModel, RewardModel, dict[str, Any]]:
        config = self._reward_config
        self._stage("sampling answers")
        samples = LocalSampler(backbone, None, self._sampling(backbone, 1.0))
        queries = preferences.queries[Split.TRAIN][-SAMPLES_TO_NORMALISE:]
        queries *= -(-FEWEST_SAMPLES // len(queries))  # few people ask few questions
        reference = samples(queries, range(len(queries)))
        held_out = preferences.pairs[Split.HELD_OUT]
        # The reward model has not seen the judge's votes either, and with few votes every one of them counts.
        unseen = {"reward": held_out + preferences.pairs[Split.JUDGE], "judge": held_out}
        # Two models that began alike would go on agreeing on more than the votes say.
        apart = replace(config, seed=config.seed + 1)
        models, reports = [], {}
        for adapter, split, its in (("reward", Split.TRAIN, config), ("judge", Split.JUDGE, apart)):
            self._stage(adapter)
            pairs = preferences.pairs[split]
            steps = config.epochs * -(-len(pairs) // config.batch)
            model = reward_model.train(
                backbone, adapter, pairs, its, accelerator=Accelerator(), on_step=self._on_step(adapter, steps)
            )
            model.normalise(reference)
            votes = [pair for pair in pairs if pair.shown]  # nobody's lengths are a trusted pair's
            reports[adapter] = asdict(reward_model.report(model, unseen[adapter], votes))
            models.append(model)
        return models[0], models[1], reports

    def _improve(
        self, backbone: Backbone, reward: RewardModel, preferences: Preferences, sample: Sampler, incumbent: Policy
    ) -> bool:
        self._stage("ppo")
        config = self._ppo_config
        backbone.adapters.add("policy")
        if incumbent.name != BASE_POLICY and self.settings.training.start_from == "incumbent":
            backbone.adapters.set_state("policy", backbone.adapters.state("incumbent"))
        head: nn.Linear = reward.value_start("value")
        return ppo.learn(
            backbone,
            head,
            preferences.queries[Split.TRAIN],
            sample,
            reward.score,
            config,
            accelerator=Accelerator(),
            on_step=self._on_step("ppo", config.steps),
        )

    def _measure(
        self,
        backbone: Backbone,
        chat: ChatFormat,
        judge: RewardModel,
        preferences: Preferences,
        incumbent: Policy,
    ) -> dict[str, Any]:
        self._stage("measuring")
        on_step = self._on_step("measuring", 1 + len(probes.KINDS))
        config = self._ppo_config
        sampling = self._sampling(backbone, config.temperature)
        base = LocalSampler(backbone, None, sampling)
        candidate = LocalSampler(backbone, "policy", sampling)
        is_base = incumbent.name == BASE_POLICY
        serving = base if is_base else LocalSampler(backbone, "incumbent", sampling)
        queries = preferences.queries[Split.HELD_OUT][-PROMPTS_MEASURED:]
        measured = measure(
            candidate,
            serving,
            judge.score,
            partial(log_ratios, backbone, temperature=config.temperature),
            queries,
            [preferences.conversations[query] for query in queries],
            seed=config.seed,
        )
        figures = asdict(measured)
        on_step(0, figures)
        for step, kind in enumerate(probes.KINDS, start=1):
            probed = probe(kind, candidate, serving, chat, base=None if is_base else base, seed=config.seed)
            on_step(step, probed)
            figures |= probed
        return {"incumbent": incumbent.name, "candidate": figures}

    def _gate(self, figures: dict[str, Any], reports: dict[str, Any]) -> GateReport:
        self._stage("gate")
        reward = {f"reward_{name}": figure for name, figure in reports["reward"].items()}
        report = gate.judge(figures["candidate"] | reward, self.settings.gate)
        checked = {check.name: check.figure for check in report.checks if check.figure is not None}
        self._on_step("gate", 1)(0, checked | {"passed": float(report.passed)})
        return report

    def _publish(
        self,
        backbone: Backbone,
        reward: RewardModel,
        metrics: dict[str, Any],
        verdict: GateReport,
        incumbent: Policy,
    ) -> None:
        self._stage("publishing")
        state = self.settings.state
        reward_id = new_id("rm")
        path, sha256 = registry.publish_folder(state, reward_id, reward.save, parent="reward_models")
        row = learning.RewardModelRow(reward_id, self.run.id, path, sha256, metrics["reward"])
        name = registry.next_name(self.db)
        path, sha256 = registry.publish_folder(
            state, name, lambda folder: backbone.publish("policy", folder), placing=self._while_ours()
        )
        with transaction(self.db):
            runs.finish(self.db, self.run.id, RunStatus.SUCCEEDED)
            learning.insert_reward_model(self.db, row)
            status, problem = self._status(verdict, incumbent)
            candidate = Policy(
                name, incumbent.name, path, sha256, incumbent.base_model, status, timestamp(), self.run.id, reward_id,
                metrics, problem,
            )  # fmt: skip
            registry.insert(self.db, candidate)

    @contextmanager
    def _while_ours(self) -> Iterator[None]:
        """Keep the run from being given up for dead meanwhile; RunLost where it has been. The next run then takes the
        same name for its policy, and may have registered it. Cancelled where somebody has asked for that."""
        with transaction(self.db):
            if runs.beat(self.db, self.run.id, stage="publishing"):
                raise Cancelled
            yield

    def _status(self, verdict: GateReport, incumbent: Policy) -> tuple[PolicyStatus, str | None]:
        """Where the candidate goes, and what keeps it from going further."""
        if not verdict.passed:
            return PolicyStatus.REJECTED, None
        if self.settings.gate.mode != "offline":
            return PolicyStatus.CANDIDATE, None
        now = registry.serving(self.db)
        if now is not None and now.name != incumbent.name:
            return PolicyStatus.CANDIDATE, (
                f"It was compared with {incumbent.name}, and {now.name} serves since: start another run, or promote it"
                " all the same with `nightshift policies promote`."
            )
        return PolicyStatus.PROMOTED, None

    def _sampling(self, backbone: Backbone, temperature: float) -> Sampling:
        return Sampling(
            max_tokens=self.settings.training.max_answer_tokens, temperature=temperature, end_ids=backbone.end_ids
        )

    @property
    def _reward_config(self) -> RewardConfig:
        return self._config(RewardConfig, "reward")

    @property
    def _ppo_config(self) -> PPOConfig:
        return self._config(PPOConfig, "ppo")

    def _config(self, kind: type[C], section: str) -> C:
        """The settings' fields of a config; a run may ask for its own seed."""
        seed = self.run.config.get("seed", self.settings.training.seed)
        return kind(**({"seed": seed} | getattr(self.settings.training, section)))

    def _stage(self, name: str) -> None:
        self.keeper.stage(name)
        self.watch(name, 0, 0, {})

    def _on_step(self, stage: str, steps: int) -> Callable[[int, dict[str, float]], None]:
        def on_step(step: int, figures: dict[str, float]) -> None:
            def show(**more: float) -> None:
                self.watch(stage, step + 1, steps, figures | more)

            self.keeper.figures(step, figures)
            show()
            # Between steps none of the engines' requests are ours, and people's come first.
            if self.keeper.wait_while(
                lambda: any(engine.requests() for engine in self.engines),
                limit_s=self.settings.training.wait_for_chat_s,
                waiting=lambda waited_s: show(waited_s=waited_s),
            ):
                show()

        return on_step

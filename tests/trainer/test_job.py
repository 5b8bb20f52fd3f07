"""The main path, from votes in the record to a candidate in the registry, on a model of a second."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pysqlite3 import dbapi2 as sqlite3
from safetensors import SafetensorError
from sqlite_utils import Database
from transformers import LlamaConfig, LlamaForCausalLM

from data import comparisons, completions, database, keys, learning, raters, registry, runs
from data.database import connect, transaction
from data.settings import EngineSettings, GateSettings, Settings, TrainingSettings
from data.types import Choice, Feedback, PolicyStatus, Role, RunStatus
from tests.trainer.test_rollout import FakeEngine, running_engine
from trainer import gate, job, keeper, rollout
from trainer.backbone import Backbone
from trainer.encoding import Answer, ChatFormat
from trainer.gate import Check, GateReport
from trainer.keeper import Cancelled
from trainer.measure import probe
from trainer.preferences import Split, split_of
from trainer.reward_model import RewardModel
from trainer.rollout import Engine, Sampler

AddPair = Callable[..., str]
Vote = Callable[..., None]


@pytest.fixture
def model(tmp_path: Path, chat: ChatFormat) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, initializer_range=0.2, eos_token_id=list(range(1, 60)), pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    chat.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def settings(tmp_path: Path, model: Path, plain_environment: None) -> Settings:
    training = TrainingSettings(
        min_votes=40, rank=8, alpha=16, max_answer_tokens=8, max_prompt_tokens=64, bf16=False,
        reward={"batch": 16, "heads": 2, "learning_rate": 0.01},
        ppo={"steps": 3, "rollouts": 8, "minibatch": 4, "kl_budget": 1e9, "missing_end_score": -5.0},
    )  # fmt: skip
    made = Settings(state=tmp_path / "state", model=str(model), training=training)
    db = connect(made.database)
    registry.ensure_base_policy(db, made.state, model)
    db.close()
    return made


@pytest.fixture
def vote(db: Database, add_pair: AddPair) -> Vote:
    """One person chats and votes: short answers are better, whichever side they are on."""
    with transaction(db):
        key, _ = keys.create(db, role=Role.USER, feedback=Feedback.AUTO, label="", actor="test")

    def cast(number: int, choice: Choice = Choice.A, *, question: str = "question") -> None:
        messages = [{"role": "user", "content": f"{question} {number}"}]
        answers = ("yes", "no no") if choice is not Choice.B else ("no no", "yes")
        pair = add_pair(key.id, answers=answers, messages=messages)
        with transaction(db):
            comparisons.vote(db, pair, key_id=key.id, role=Role.USER, choice=choice, comment=None, window_s=600)

    return cast


@pytest.fixture
def voted(vote: Vote) -> None:
    choices = [Choice.A, Choice.B] * 4 + [Choice.TIE, Choice.BOTH_BAD]
    for number in range(120):
        vote(number, choices[number % 10])


def request(db: Database, **config: Any) -> str:
    with transaction(db):
        return runs.request(db, requested_by="test", config=config).id


def changed(settings: Settings, *, engines: Sequence[FakeEngine] = (), **training: Any) -> Settings:
    """The settings with other ones of training, and with these engines."""
    named = EngineSettings(urls=[engine.url for engine in engines])
    update = {"training": settings.training.model_copy(update=training), "engine": named}
    return settings.model_copy(update=update)


def test_a_run_turns_votes_into_a_candidate(settings: Settings, db: Database, voted: None) -> None:
    id = request(db, seed=7)
    seen: list[tuple[str, int, int]] = []
    run = job.once(settings, watch=lambda stage, step, steps, figures: seen.append((stage, step, steps)))
    assert run is not None
    assert (run.id, run.status, run.error) == (id, RunStatus.SUCCEEDED, None)

    base, candidate = registry.list_policies(db)
    assert (candidate.name, candidate.parent) == ("policy-0001", base.name)
    assert base.status is PolicyStatus.PROMOTED, "what serves is untouched"
    assert candidate.run_id == id
    folder = registry.checked_folder(settings.state, candidate)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    (reward,) = learning.reward_models(db)
    assert candidate.reward_model == reward.id
    assert registry.folder_digest(settings.state / reward.path) == reward.sha256
    assert reward.metrics["accuracy"] == 1.0
    assert candidate.metrics["candidate"]["prompts"] > 0
    assert candidate.metrics["candidate"]["facts_answers"] >= 600
    assert candidate.metrics["incumbent"] == base.name
    assert candidate.metrics["stopped_at_kl_budget"] is False

    used = list(db.query("SELECT * FROM run_votes"))
    assert len(used) == 108, "all but both_bad"
    assert {row["split"] for row in used} == set(Split)
    curves = runs.metrics(db, id)
    assert [step for step, _ in curves["ppo/score"]] == [0, 1, 2]
    assert {"reward/loss", "judge/loss", "ppo/kl", "ppo/length", "ppo/episodes_per_s"} <= curves.keys()
    assert {"measuring/judge_win_rate", "measuring/facts", "measuring/incumbent_facts"} <= curves.keys()
    last = {stage: (step, steps) for stage, step, steps in seen}
    assert last["reward"][0] == last["reward"][1] > 1
    assert last["judge"][0] == last["judge"][1] > 1
    assert last["ppo"] == (3, 3)
    assert last["measuring"] == (4, 4)
    assert last["gate"] == (1, 1)
    assert list(last)[-1] == "publishing"


def test_the_judge_begins_with_nothing_of_the_reward_model(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or PPO would learn what pleases both by chance."""
    fresh: dict[str, torch.Tensor] = {}
    begin = RewardModel.__init__

    def seen(self: RewardModel, backbone: Backbone, adapter: str, **more: Any) -> None:
        begin(self, backbone, adapter, **more)
        fresh[adapter] = self.head.weight.detach().clone()

    monkeypatch.setattr(RewardModel, "__init__", seen)
    job.once(settings, request={"seed": 7})
    alike = torch.corrcoef(torch.stack([fresh["reward"].flatten(), fresh["judge"].flatten()]))[0, 1]
    assert abs(alike) < 0.5


def test_votes_that_length_alone_explains_are_turned_away_at_the_gate(
    settings: Settings, db: Database, voted: None
) -> None:
    """The voters liked short answers, whatever they said; a reward model cannot know more than that."""
    run = job.once(settings, request={})
    assert run is not None
    assert (run.status, run.error) == (RunStatus.SUCCEEDED, None)
    _, candidate = registry.list_policies(db)
    assert candidate.status is PolicyStatus.REJECTED
    checks = {check["name"]: check for check in candidate.metrics["gate"]["checks"]}
    assert candidate.metrics["gate"]["passed"] is False
    assert checks["reward_model"]["passed"] is False
    unseen = "SELECT count(*) FROM run_votes WHERE run_id = ? AND split <> 'train' AND choice <> 'tie'"
    (pairs,) = db.execute(unseen, (run.id,)).fetchone()
    assert candidate.metrics["reward"]["pairs"] == pairs, "the judge's votes count too: the reward model saw neither"
    said = f"right about 100.0% of {pairs} votes that it has not seen, and length alone about 100.0%"
    assert said in checks["reward_model"]["sentence"]
    curves = runs.metrics(db, run.id)
    assert curves["gate/passed"] == [(0, 0.0)]
    assert {f"gate/{name}": [(0, check["figure"])] for name, check in checks.items()}.items() <= curves.items()


def passing(figures: Mapping[str, float], settings: GateSettings) -> GateReport:
    return GateReport((Check("judge", figures["judge_win_rate"], 0.5, True, "It is fine."),))


@pytest.mark.parametrize(
    ("mode", "status"),
    [("trial", PolicyStatus.CANDIDATE), ("manual", PolicyStatus.CANDIDATE), ("offline", PolicyStatus.PROMOTED)],
)
def test_where_a_candidate_goes_that_passed_the_gate(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch, mode: str, status: PolicyStatus
) -> None:
    with transaction(db):
        registry.set_serving(db, "policy-0000")
    monkeypatch.setattr(gate, "judge", passing)
    job.once(settings.model_copy(update={"gate": GateSettings.model_validate({"mode": mode})}), request={})
    base, candidate = registry.list_policies(db)
    assert (base.status, candidate.status) == (PolicyStatus.SERVING, status)
    assert candidate.metrics["gate"]["passed"] is True


@pytest.mark.parametrize("mode", ["offline", "trial"])
def test_a_candidate_takes_no_place_of_a_policy_that_it_was_never_compared_with(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(gate, "judge", passing)
    settings = settings.model_copy(update={"gate": GateSettings.model_validate({"mode": mode})})
    job.once(settings, request={})
    with transaction(db):
        registry.set_serving(db, "policy-0000")

    def watch(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if stage == "gate":
            with transaction(db):
                registry.set_serving(db, "policy-0001")

    job.once(settings, request={}, watch=watch)
    _, serving, candidate = registry.list_policies(db)
    assert serving.status is PolicyStatus.SERVING
    assert (candidate.status, candidate.parent) == (PolicyStatus.CANDIDATE, "policy-0000")
    assert candidate.metrics["incumbent"] == "policy-0000"
    problem = "compared with policy-0000, and policy-0001 serves since: start another run"
    assert (problem in (candidate.problem or "")) is (mode == "offline"), "a trial will compare the two"


def test_a_candidate_is_held_against_the_policy_that_serves(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_incumbent(metrics: dict[str, Any]) -> list[float]:
        return [figure for name, figure in metrics["candidate"].items() if name.startswith("incumbent_")]

    monkeypatch.setattr(gate, "judge", passing)
    wild = settings.training.ppo | {"learning_rate": 0.1}
    job.once(changed(settings, ppo=wild), request={})
    job.once(settings, request={})
    with transaction(db):
        registry.set_serving(db, "policy-0001")
    job.once(settings, request={})
    _, first, second, third = (policy.metrics for policy in registry.list_policies(db))
    assert (second["incumbent"], third["incumbent"]) == ("policy-0000", "policy-0001")
    assert second["candidate"]["kl"] == third["candidate"]["kl"], "the same candidate, as far from the base"
    assert of_the_incumbent(first) == of_the_incumbent(second)
    assert of_the_incumbent(third) != of_the_incumbent(second)
    assert second["candidate"]["judge_win_rate"] != third["candidate"]["judge_win_rate"]


def test_the_probes_are_asked_of_the_incumbent_and_of_the_base_model(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[list[Answer], list[Answer] | None]] = []

    def spy(kind: str, candidate: Sampler, incumbent: Sampler, *args: Any, base: Sampler | None, **rest: Any) -> Any:
        asked = [(70, 80, 90)] * 8, range(8)
        said.append((incumbent(*asked), base and base(*asked)))
        return probe(kind, candidate, incumbent, *args, base=base, **rest)

    monkeypatch.setattr(gate, "judge", passing)
    monkeypatch.setattr(job, "probe", spy)
    job.once(changed(settings, ppo=settings.training.ppo | {"learning_rate": 0.1}), request={})
    with transaction(db):
        registry.set_serving(db, "policy-0001")
    job.once(settings, request={})
    (of_the_base, none), *_, (of_the_first, also_of_the_base) = said
    assert none is None, "it is the incumbent, and answers once"
    assert also_of_the_base == of_the_base
    assert of_the_first != of_the_base
    assert "base_sycophancy" in registry.get(db, "policy-0002").metrics["candidate"]


@pytest.mark.parametrize("rank", [16, 1])
def test_the_rank_may_grow_but_not_shrink_below_what_serves(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(gate, "judge", passing)
    job.once(settings, request={})
    with transaction(db):
        registry.set_serving(db, "policy-0001")
    job.once(settings, request={})
    run = job.once(changed(settings, rank=rank), request={})
    assert run is not None
    if rank == 1:
        assert (run.status, runs.metrics(db, run.id)) == (RunStatus.FAILED, {}), "before any work is done"
        assert re.match(
            "policy-0001, which serves, .*another rank than 1.*: set training.rank to what", run.error or ""
        )
        return
    same_rank, larger = (policy.metrics["candidate"] for policy in registry.list_policies(db)[-2:])
    assert larger["incumbent_length"] == same_rank["incumbent_length"]
    assert larger["incumbent_unfinished"] == same_rank["incumbent_unfinished"]
    grown = Path(registry.list_policies(db)[-1].path) / "adapter_config.json"
    assert json.loads((settings.state / grown).read_text())["r"] == 16


def test_nothing_queued_is_no_run(settings: Settings) -> None:
    assert job.once(settings) is None


def test_a_run_can_be_asked_for_and_begun_at_once_unless_there_is_one(settings: Settings, db: Database) -> None:
    run = job.once(settings, request={"seed": 3})
    assert run is not None
    assert (run.config, run.requested_by, run.status) == ({"seed": 3}, "cli", RunStatus.FAILED)
    waiting = request(db)
    with pytest.raises(runs.RunActive, match=waiting):
        job.once(settings, request={})


# What ends a run as failed, and the sentence that says what to do


def failed(settings: Settings, db: Database, sentence: str) -> None:
    """Run, and see that it failed with this sentence, that nothing came of it, and that another may begin."""
    run = job.once(settings, request={})
    assert run is not None
    assert run.status is RunStatus.FAILED
    assert re.search(sentence, run.error or ""), run.error
    assert [policy.name for policy in registry.list_policies(db)] == ["policy-0000"]
    assert learning.reward_models(db) == []
    assert list(settings.state.glob("*/.*.building")) == []
    request(db)


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ([Choice.A, Choice.B] * 10, r"\d+ votes to train on, and training.min_votes is 40: collect more votes\."),
        ([Choice.TIE] * 120, "0 votes to train on"),
        ([Choice.BOTH_BAD] * 120, "0 votes to train on"),
        ([Choice.A] * 100 + [Choice.TIE] * 20, r"Every vote is for the answer shown as 'a'.*`nightshift votes list`"),
    ],
    ids=["few", "ties", "both bad", "one-sided"],
)
def test_votes_that_teach_nothing(
    settings: Settings, db: Database, vote: Vote, choices: list[Choice], sentence: str
) -> None:
    for number, choice in enumerate(choices):
        vote(number, choice)
    failed(settings, db, sentence)


def test_votes_of_which_none_is_left_to_measure_with(settings: Settings, db: Database, vote: Vote) -> None:
    (user,) = [key.id for key in keys.list_all(db)]
    for number in range(100):
        conversation = completions.conversation_of(user, [{"role": "user", "content": f"question {number}"}])
        if split_of(user, conversation) is Split.TRAIN:
            vote(number, [Choice.A, Choice.B][number % 2])
    failed(settings, db, "No vote on the judge side prefers an answer: collect more votes")


def test_no_usable_prompt(settings: Settings, db: Database, vote: Vote) -> None:
    for number in range(60):
        vote(number, [Choice.A, Choice.B][number % 2], question="a question of more than 64 bytes " * 3)
    failed(settings, db, r"0 votes to train on.*raise training.max_prompt_tokens.*beyond which 60 lie")


def test_a_constant_reward(settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RewardModel, "score", lambda self, answers: torch.zeros(len(answers)))
    ppo_settings = settings.training.ppo | {"missing_end_score": 0.0}
    failed(changed(settings, ppo=ppo_settings), db, "the reward is the same for every answer: collect more votes")


@pytest.mark.parametrize("section", ["reward", "ppo"])
def test_numbers_that_are_not_finite(settings: Settings, db: Database, voted: None, section: str) -> None:
    wild = getattr(settings.training, section) | {"learning_rate": 1e30}
    failed(changed(settings, **{section: wild}), db, "NaN or infinite: lower the learning rate")


def out_of_memory(*args: object, **kwargs: object) -> None:
    torch.empty(2**50)


@pytest.mark.parametrize("where", ["trainer.reward_model.Optimizer", "trainer.ppo.Optimizer", "trainer.job.measure"])
def test_no_memory(settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, out_of_memory)
        failed(settings, db, "Out of memory: lower microbatch_tokens")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full: make room in the state folder"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
        (sqlite3.OperationalError("database or disk is full"), "The disk is full"),
        (sqlite3.OperationalError("database is locked"), "The record cannot be written .*nightshift doctor"),
        (torch.OutOfMemoryError("CUDA out of memory."), "lower microbatch_tokens .*, engine.gpu_memory_share"),
        (MemoryError(), r"lower microbatch_tokens in training.ppo and in training.reward and, where prompts are long,"),
        (ZeroDivisionError("division by zero"), "A fault in the trainer .ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_while_publishing(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(self: Backbone, name: str, folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "publish", fail)
        failed(settings, db, sentence)


def test_the_end_of_a_run_can_be_written_on_a_full_disk(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for it is set aside at the beginning and given back just before."""
    room: list[int] = []
    finish = runs.finish

    def seen(*args: Any, **kwargs: Any) -> None:
        room.append(sum(path.stat().st_blocks * 512 for path in settings.state.glob("run.room")))
        finish(*args, **kwargs)

    def measured(*args: Any, **kwargs: Any) -> None:
        room.append(sum(path.stat().st_blocks * 512 for path in settings.state.glob("run.room")))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish", seen)
        patch.setattr(job, "measure", measured)
        failed(settings, db, "The disk is full")
    assert room[0] >= 2**20
    assert room[1:] == [0]


def test_rollouts_by_an_engine_that_is_not_there(settings: Settings, db: Database) -> None:
    told = "No running vLLM is known: start `nightshift up`.*training.rollouts"
    failed(changed(settings, rollouts="engine"), db, told)


def test_another_model_than_the_votes_are_for(settings: Settings, db: Database, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(settings.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    failed(settings.model_copy(update={"model": str(other)}), db, "was made for another base model.*--model")


def test_a_model_that_is_not_here(settings: Settings, db: Database) -> None:
    failed(settings.model_copy(update={"model": "nobody/nothing"}), db, "nightshift up --model nobody/nothing")


def test_a_model_without_a_chat_template(settings: Settings, db: Database) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = Path(settings.model) / name
        if path.suffix == ".jinja":
            path.unlink()
        else:
            config = json.loads(path.read_text())
            config.pop("chat_template", None)
            path.write_text(json.dumps(config))
    failed(settings, db, "cannot be trained: .*no chat template")


# The wish to stop


@pytest.mark.parametrize("stop", [Cancelled, KeyboardInterrupt])
def test_a_cancelled_run_leaves_nothing_half(
    settings: Settings, db: Database, voted: None, stop: type[BaseException]
) -> None:
    id = request(db)

    def watch(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if stage == "ppo" and step == 1:
            if stop is KeyboardInterrupt:
                raise KeyboardInterrupt
            with transaction(db):
                runs.cancel(db, id, actor="test")

    run = job.once(settings, watch=watch)
    assert run is not None
    assert run.status is RunStatus.CANCELLED
    assert [policy.name for policy in registry.list_policies(db)] == ["policy-0000"]


def test_a_run_that_was_given_up_for_dead_registers_nothing(settings: Settings, db: Database, voted: None) -> None:
    id = request(db)

    def watch(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if stage == "publishing":
            with transaction(db):
                db.execute("UPDATE runs SET heartbeat_at = '2020-01-01T00:00:00.000Z' WHERE id = ?", (id,))
                runs.give_up_the_dead(db)

    run = job.once(settings, watch=watch)
    assert run is not None
    assert (run.status, "process died" in (run.error or "")) == (RunStatus.FAILED, True)
    assert [policy.name for policy in registry.list_policies(db)] == ["policy-0000"]
    assert learning.reward_models(db) == []


def test_a_run_that_wakes_after_the_next_one_leaves_its_policy_alone(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it publishes, it is given up for dead, and another run registers a policy of the same name."""
    write = Backbone.publish

    def slow(self: Backbone, name: str, folder: Path) -> None:
        write(self, name, folder)
        if name == "policy":
            theirs = shutil.copytree(folder, settings.state / "policies/policy-0001")
            (theirs / "theirs").touch()
            base, sha256 = registry.get(db, "policy-0000"), registry.folder_digest(theirs)
            with transaction(db):
                db.execute("UPDATE runs SET heartbeat_at = '2020-01-01T00:00:00.000Z'")
                runs.give_up_the_dead(db)
                registry.insert(db, replace(base, name="policy-0001", path="policies/policy-0001", sha256=sha256))

    monkeypatch.setattr(Backbone, "publish", slow)
    run = job.once(settings, request={})
    assert run is not None
    assert run.status is RunStatus.FAILED
    _, theirs = registry.list_policies(db)
    assert registry.checked_folder(settings.state, theirs)
    assert not list(settings.state.glob("policies/.*"))


# The engine


@pytest.fixture
def vllm() -> Iterator[FakeEngine]:
    with running_engine() as server:
        yield server


def test_the_engine_writes_the_answers_and_keeps_no_adapter(
    settings: Settings, db: Database, voted: None, vllm: FakeEngine
) -> None:
    home = settings.state / "rollouts"
    (home / "rollout-run_dead-00002").mkdir(parents=True)
    vllm.loaded["rollout-run_dead-00002"] = str(home / "rollout-run_dead-00002")
    run = job.once(changed(settings, engines=[vllm], rollouts="engine", wait_for_chat_s=0), request={})
    assert run is not None
    assert (run.status, run.error) == (RunStatus.SUCCEEDED, None)
    asked = [body for path, body in vllm.bodies if path == "/v1/completions"]
    assert len(asked) == 3 * 8
    assert {body["model"] for body in asked} == {f"rollout-{run.id}-{step:05d}" for step in range(3)}
    assert not vllm.loaded
    assert list(home.iterdir()) == []


def test_an_engine_that_refuses_ends_the_run_and_keeps_no_adapter(
    settings: Settings, db: Database, voted: None, vllm: FakeEngine
) -> None:
    vllm.refuse_after = 10
    failed(changed(settings, engines=[vllm], rollouts="engine"), db, r"answered 400: .*too long.*training.rollouts")
    assert not vllm.loaded
    assert list((settings.state / "rollouts").iterdir()) == []


@pytest.mark.parametrize("rollouts", ["auto", "local"])
def test_on_a_cpu_the_trainer_writes_the_answers_itself(
    settings: Settings, db: Database, voted: None, vllm: FakeEngine, rollouts: str
) -> None:
    run = job.once(changed(settings, engines=[vllm], rollouts=rollouts), request={})
    assert run is not None
    assert run.status is RunStatus.SUCCEEDED
    assert vllm.bodies == []


def test_the_engines_are_those_named_or_the_one_that_up_started(settings: Settings, vllm: FakeEngine) -> None:
    assert job.find_engines(settings) == []
    (settings.state / "engine.json").write_text('{"url": "http://127.0.0.1:1234", "key": "secret"}')
    assert job.find_engines(settings) == [Engine("http://127.0.0.1:1234", "secret")]
    assert job.find_engines(changed(settings, engines=[vllm, vllm])) == [Engine(vllm.url)] * 2


# Manners


def test_training_waits_while_people_are_answered_but_not_for_ever(
    settings: Settings, db: Database, voted: None, vllm: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are on the second of two engines. Nobody leaves in the reward model's steps; in the first of PPO they do."""
    monkeypatch.setattr(keeper, "WORK_S", 0.0)
    vllm.people = 1
    waits: dict[str, list[float]] = {}

    def watch(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if "waited_s" in figures:
            waits.setdefault(stage, []).append(figures["waited_s"])
            if stage == "ppo":
                vllm.people = 0

    with running_engine() as idle:
        run = job.once(changed(settings, engines=[idle, vllm], wait_for_chat_s=0.01), request={}, watch=watch)
    assert run is not None
    assert run.status is RunStatus.SUCCEEDED
    assert len(waits["reward"]) > 1
    assert len(waits["ppo"]) == 1
    assert "measuring" not in waits


def test_however_short_its_steps_a_run_works_before_it_waits_again(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighty steps of an eighth of a second, while people chat all the time: five waits, one for every two seconds."""
    now = 1000.0

    def chatting() -> bool:
        nonlocal now
        now += 1.0
        return True

    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(keeper, "LOOK_S", 0.0)
    waits = []
    with keeper.Keeper(settings.database, request(db)) as keep:
        for _ in range(80):
            now += 0.125
            waits.append(keep.wait_while(chatting, limit_s=5.0, waiting=lambda waited_s: None))
    assert [step for step, waited in enumerate(waits, start=1) if waited] == [16, 32, 48, 64, 80]
    assert now == 1000.0 + 80 * 0.125 + 5 * 5.0


def test_a_run_outlives_who_writes_for_long_without_its_figures(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    id = request(db)
    with transaction(db):
        runs.claim(db)
    with keeper.Keeper(settings.database, id) as keep:
        with transaction(db):
            keep.stage("ppo")
            keep.figures(0, {"kl": 1.0})
        keep.figures(1, {"kl": 2.0})
        with transaction(db), pytest.raises(sqlite3.OperationalError, match="locked"):
            keep.finish(RunStatus.SUCCEEDED)
    assert runs.metrics(db, id) == {"ppo/kl": [(1, 2.0)]}


def test_a_run_that_waits_can_be_cancelled(
    settings: Settings, db: Database, voted: None, vllm: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "BEAT_S", 0.05)
    monkeypatch.setattr(keeper, "WORK_S", 0.0)
    vllm.people = 1
    id = request(db)

    def watch(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if "waited_s" in figures:
            with transaction(db):
                runs.cancel(db, id, actor="test")

    run = job.once(changed(settings, engines=[vllm], wait_for_chat_s=3600), watch=watch)
    assert run is not None
    assert run.status is RunStatus.CANCELLED


@pytest.mark.parametrize("status", [503, 500], ids=["full", "its core has died"])
def test_a_run_that_waits_for_its_engine_can_be_cancelled(
    settings: Settings, db: Database, voted: None, vllm: FakeEngine, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(keeper, "BEAT_S", 0.05)
    monkeypatch.setattr(rollout, "RETRY_SECONDS", (3600,))
    monkeypatch.setattr(rollout, "RESTART_SECONDS", (3600,))
    vllm.full, vllm.full_status = 1000, status
    id = request(db)

    def watch(stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if stage == "ppo":
            with transaction(db):
                runs.cancel(db, id, actor="test")

    run = job.once(changed(settings, engines=[vllm], rollouts="engine", wait_for_chat_s=0), watch=watch)
    assert run is not None
    assert run.status is RunStatus.CANCELLED
    assert not vllm.loaded


# Sudden death


def test_what_a_killed_run_left_is_cleared_away(settings: Settings, db: Database, voted: None) -> None:
    run = job.once(settings, request={})
    assert run is not None
    kept = {path for path in settings.state.glob("*/*") if path.is_dir()}
    for left in ("policies/.policy-0002.building", "reward_models/.rm_0.building", "reward_models/rm_0"):
        (settings.state / left).mkdir()
        (settings.state / left / "adapter_model.safetensors").write_bytes(b"half")
    (settings.state / "policies/policy-0002").mkdir()  # in its place, but not registered: it is written anew
    run = job.once(settings, request={})
    assert run is not None
    assert run.status is RunStatus.SUCCEEDED
    policies = registry.list_policies(db)
    assert [policy.name for policy in policies] == ["policy-0000", "policy-0001", "policy-0002"]
    for policy in policies:
        registry.checked_folder(settings.state, policy)
    new = {settings.state / policies[2].path, settings.state / learning.reward_models(db)[0].path}
    assert {path for path in settings.state.glob("*/*") if path.is_dir()} == kept | new


def environment_of(settings: Settings, **ppo_settings: float) -> dict[str, str]:
    """What a trainer in a process of its own needs to learn from this record."""
    ppo_settings = {"steps": 2, "rollouts": 8, "minibatch": 4, "kl_budget": 1e9} | ppo_settings
    return os.environ | {
        "NIGHTSHIFT_STATE": str(settings.state), "NIGHTSHIFT_MODEL": settings.model,
        "NIGHTSHIFT_TRAINING__MIN_VOTES": "40", "NIGHTSHIFT_TRAINING__RANK": "8",
        "NIGHTSHIFT_TRAINING__MAX_ANSWER_TOKENS": "8", "NIGHTSHIFT_TRAINING__BF16": "false",
        "NIGHTSHIFT_TRAINING__PPO": json.dumps(ppo_settings),
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def in_ppo(db: Database, process: subprocess.Popen[Any]) -> None:
    """Wait until a run is in the middle of PPO."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if any(name.startswith("ppo/") for run in runs.list_runs(db) for name in runs.metrics(db, run.id)):
            break
        time.sleep(0.1)
    assert process.poll() is None, "it ended before PPO"


KILLED_WHILE_PUBLISHING = """
import os, signal, sys
from trainer import __main__
from trainer.backbone import Backbone
from data import registry

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv.pop(1) == "writing":
    write = Backbone.publish
    Backbone.publish = lambda self, name, folder: (write(self, name, folder), name == "policy" and die())
else:
    registry.insert = die
sys.argv = ["trainer", "once", "--request"]
__main__.main()
"""


@pytest.mark.parametrize("moment", ["ppo", "writing", "registering"])
def test_after_sigkill_the_next_run_starts_by_itself(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    command = ["-m", "trainer", "once", "--request"] if moment == "ppo" else ["-c", KILLED_WHILE_PUBLISHING, moment]
    environment = environment_of(settings, steps=10_000 if moment == "ppo" else 1)
    with subprocess.Popen([sys.executable, *command], env=environment) as process:
        if moment == "ppo":
            in_ppo(db, process)
            process.kill()
        assert process.wait(timeout=240) == -signal.SIGKILL
    (dead,) = runs.list_runs(db)
    assert dead.status is RunStatus.RUNNING
    assert [policy.name for policy in registry.list_policies(db)] == ["policy-0000"]
    with pytest.raises(runs.RunActive), transaction(db):  # until its heartbeat is old
        runs.request(db, requested_by="test", config={})

    monkeypatch.setattr(runs, "HEARTBEAT_STALE_S", 0.0)
    run = job.once(settings, request={})
    assert run is not None
    assert run.status is RunStatus.SUCCEEDED
    assert runs.get(db, dead.id).status is RunStatus.FAILED
    base, candidate = registry.list_policies(db)
    assert registry.checked_folder(settings.state, candidate)
    (reward,) = learning.reward_models(db)
    folders = {path.name for path in settings.state.glob("*/*") if path.is_dir()}
    assert folders == {base.name, candidate.name, reward.id}


# The command


def nightshift_train(settings: Settings, *arguments: str, **ppo_settings: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "service.cli", "train", *arguments], env=environment_of(settings, **ppo_settings),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_nightshift_train_ends_with_the_run_as_json(settings: Settings, db: Database, voted: None) -> None:
    with nightshift_train(settings, "--json", "--seed", "5", "--state", str(settings.state)) as process:
        output, progress = process.communicate(timeout=240)
    assert process.returncode == 0, progress
    (line,) = output.splitlines()
    (run,) = runs.list_runs(db)
    said = json.loads(line)
    assert (said["id"], said["status"], said["config"]) == (run.id, "succeeded", {"seed": 5})
    (_, policy) = registry.list_policies(db)
    assert (said["policy"], said["policy_status"]) == ("policy-0001", "rejected")
    assert said["gate"] == policy.metrics["gate"]
    for stage in ("loading the model", "reward", "judge", "ppo", "measuring", "gate", "publishing"):
        assert re.search(rf"^{stage} ", progress, re.MULTILINE), progress
    assert re.search(r"^ppo +2/2 .*reward .*KL .*tokens .*episodes/s", progress, re.MULTILINE), progress


def test_nightshift_train_says_why_the_gate_rejected(settings: Settings, db: Database, voted: None) -> None:
    with nightshift_train(settings) as process:
        output, progress = process.communicate(timeout=240)
    assert process.returncode == 0, progress
    (run,) = runs.list_runs(db)
    (_, policy) = registry.list_policies(db)
    reason = next(check["sentence"] for check in policy.metrics["gate"]["checks"] if not check["passed"])
    assert output == f"{run.id} succeeded: the gate rejected policy-0001. {reason}\n"


def test_nightshift_train_passes_the_failure_on(settings: Settings, db: Database) -> None:
    with nightshift_train(settings, "--json") as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    said = json.loads(output.splitlines()[-1])
    assert (said["status"], said["policy"]) == ("failed", None)
    assert "collect more votes" in said["error"]
    id = request(db)
    with nightshift_train(settings) as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert f"{id} is queued or running already" in errors


@pytest.mark.parametrize("who", ["everyone, twice", "the command"])
def test_ctrl_c_cancels_the_run(settings: Settings, db: Database, voted: None, who: str) -> None:
    with nightshift_train(settings, steps=10_000) as process:
        in_ppo(db, process)
        if who == "the command":
            process.send_signal(signal.SIGINT)
        else:  # what a terminal does, under an impatient finger
            os.killpg(process.pid, signal.SIGINT)
            os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (run,) = runs.list_runs(db)
    assert run.status is RunStatus.CANCELLED
    assert [policy.name for policy in registry.list_policies(db)] == ["policy-0000"]


# Raters


def crowd_votes(db: Database, add_pair: AddPair, *, people: int, votes: int, bots: int = 0) -> list[str]:
    """Honest people like short answers, whichever side they are on; bots always take the first. The bots' keys."""
    with transaction(db):
        made = [
            keys.create(db, role=Role.USER, feedback=Feedback.AUTO, label="", actor="test")[0].id
            for _ in range(people + bots)
        ]
    for person, key in enumerate(made):
        for number in range(votes):
            choice = Choice.A if person >= people or number % 2 else Choice.B
            answers = ("yes", "no no") if number % 2 else ("no no", "yes")
            messages = [{"role": "user", "content": f"question {person} {number}"}]
            pair = add_pair(key, answers=answers, messages=messages)
            with transaction(db):
                comparisons.vote(db, pair, key_id=key, role=Role.USER, choice=choice, comment=None, window_s=600)
    return made[people:]


def test_a_run_leaves_out_who_votes_by_the_side_and_says_so(
    settings: Settings, db: Database, add_pair: AddPair
) -> None:
    (bot,) = crowd_votes(db, add_pair, people=6, votes=25, bots=1)
    seen: list[str] = []
    run = job.once(settings, request={}, watch=lambda stage, step, steps, figures: seen.append(stage))
    assert run is not None
    assert (run.status, run.error) == (RunStatus.SUCCEEDED, None)
    assert list(dict.fromkeys(seen))[2:4] == ["raters", "preparing votes"]
    rows = {row["key"]: row for row in raters.standing(db)}
    assert rows[bot]["quarantine"] == "suspected"
    assert rows[bot]["reason"] == "25 of 25 votes are for the answer shown first, though sides are random."
    assert rows[bot]["run"] == run.id
    assert {row["quarantine"] for key, row in rows.items() if key != bot} == {None}
    assert min(row["reliability"] for key, row in rows.items() if key != bot) > rows[bot]["reliability"]
    used = {row["key_id"] for row in db.query("SELECT DISTINCT key_id FROM run_votes JOIN votes ON votes.id = vote_id")}
    assert used == rows.keys() - {bot}

    with transaction(db):
        raters.release(db, bot, actor="test")
    again = job.once(settings, request={})
    assert again is not None
    weights = db.execute(
        "SELECT DISTINCT weight FROM run_votes JOIN votes ON votes.id = vote_id WHERE run_id = ? AND key_id = ?",
        (again.id, bot),
    ).fetchall()
    assert weights == [(1.0,)], "an operator's word counts for more than the run's"


@pytest.mark.parametrize(("people", "freed"), [(5, False), (6, True)])
def test_whom_an_earlier_run_suspected_is_freed_only_by_a_crowd(
    settings: Settings, db: Database, add_pair: AddPair, people: int, freed: bool
) -> None:
    crowd_votes(db, add_pair, people=people, votes=25)
    (suspect,) = db.execute("SELECT min(key_id) FROM votes").fetchone()
    earlier = runs.request(db, requested_by="test", config={}).id
    runs.cancel(db, earlier, actor="test")
    with transaction(db):
        raters.keep(db, earlier, {suspect: raters.Standing(25, 12, 0.0, "a coin")})
    run = job.once(settings, request={})
    assert run is not None
    assert run.status is RunStatus.SUCCEEDED
    assert raters.left_out(db) == (set() if freed else {suspect})


def test_votes_of_nobody_but_bots_end_with_a_sentence(settings: Settings, db: Database, add_pair: AddPair) -> None:
    for bot in crowd_votes(db, add_pair, people=1, votes=30, bots=2):
        with transaction(db):
            raters.confirm(db, bot, actor="test")
    failed(settings, db, "votes to train on.*release some of 60 that are left out: `nightshift raters list`")

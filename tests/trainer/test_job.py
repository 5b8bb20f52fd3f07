"""The main path, from votes in the record to a candidate in the registry, on a model of a second."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlite_utils import Database
from transformers import LlamaConfig, LlamaForCausalLM

from data import comparisons, keys, learning, registry, runs
from data.database import connect, transaction
from data.settings import Settings, TrainingSettings
from data.types import Choice, Feedback, PolicyStatus, Role, RunStatus
from trainer import job, ppo
from trainer.backbone import Backbone
from trainer.encoding import ChatFormat
from trainer.keeper import Cancelled
from trainer.preferences import Split

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
    """One person chats and votes: short answers are better."""
    with transaction(db):
        key, _ = keys.create(db, role=Role.USER, feedback=Feedback.AUTO, label="", actor="test")

    def cast(number: int, choice: Choice = Choice.A) -> None:
        messages = [{"role": "user", "content": f"question {number}"}]
        pair = add_pair(key.id, answers=("yes", "no no"), messages=messages)
        with transaction(db):
            comparisons.vote(
                db, pair, key_id=key.id, role=Role.USER, choice=choice, comment=None, window_s=600
            )  # fmt: skip

    return cast


@pytest.fixture
def voted(vote: Vote) -> None:
    choices = [Choice.A] * 8 + [Choice.TIE, Choice.BOTH_BAD]
    for number in range(120):
        vote(number, choices[number % 10])


def request(db: Database, **config: Any) -> str:
    with transaction(db):
        return runs.request(db, requested_by="test", config=config).id


def test_a_run_turns_votes_into_a_candidate(settings: Settings, db: Database, voted: None) -> None:
    id = request(db, seed=7)
    seen: list[tuple[str, int, int]] = []
    run = job.once(settings, watch=lambda stage, step, steps, figures: seen.append((stage, step, steps)))
    assert run is not None
    assert (run.id, run.status, run.error) == (id, RunStatus.SUCCEEDED, None)

    base, candidate = registry.list_policies(db)
    assert (candidate.name, candidate.status, candidate.parent) == ("policy-0001", PolicyStatus.CANDIDATE, base.name)
    assert base.status is PolicyStatus.PROMOTED, "what serves is untouched"
    assert candidate.run_id == id
    folder = registry.checked_folder(settings.state, candidate)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    (reward,) = learning.reward_models(db)
    assert candidate.reward_model == reward.id
    assert registry.folder_digest(settings.state / reward.path) == reward.sha256
    assert reward.metrics["accuracy"] == 1.0
    assert candidate.metrics["candidate"]["prompts"] > 0
    assert set(candidate.metrics["probes"]) == {"facts", "refusals", "sycophancy"}
    assert candidate.metrics["stopped_at_kl_budget"] is False

    used = list(db.query("SELECT * FROM run_votes"))
    assert len(used) == 108, "all but both_bad"
    assert {row["split"] for row in used} == set(Split)
    curves = runs.metrics(db, id)
    assert [step for step, _ in curves["ppo/score"]] == [0, 1, 2]
    assert {"reward/loss", "judge/loss", "ppo/kl", "ppo/length", "ppo/episodes_per_s"} <= curves.keys()
    assert ("ppo", 3, 3) in seen


def test_nothing_queued_is_no_run(settings: Settings) -> None:
    assert job.once(settings) is None


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ([Choice.A] * 20, r"\d+ votes to train on, and training.min_votes is 40: collect more votes"),
        ([Choice.TIE] * 120, "0 votes to train on"),
    ],
)
def test_too_few_votes_end_with_what_to_do(
    settings: Settings, db: Database, vote: Vote, choices: list[Choice], sentence: str
) -> None:
    for number, choice in enumerate(choices):
        vote(number, choice)
    request(db)
    run = job.once(settings)
    assert run is not None
    assert run.status is RunStatus.FAILED
    assert re.search(sentence, run.error or "")
    assert [policy.name for policy in registry.list_policies(db)] == ["policy-0000"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (MemoryError(), "lower microbatch_tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower microbatch_tokens"),
        (ppo.CannotLearn("a gradient is NaN"), "a gradient is NaN"),
    ],
)
def test_a_failure_leaves_no_candidate_and_the_next_run_starts(
    settings: Settings, db: Database, voted: None, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    request(db)
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "publish", fail)
        run = None
        try:
            run = job.once(settings)
        except RuntimeError:
            run = runs.list_runs(db)[0]
    assert run is not None
    assert run.status is RunStatus.FAILED
    assert sentence in (run.error or "")
    assert [policy.name for policy in registry.list_policies(db)] == ["policy-0000"]
    assert learning.reward_models(db) == []
    request(db)


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


@pytest.fixture
def running(settings: Settings, db: Database, voted: None) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a process of its own, in the middle of PPO."""
    overrides = {
        "NIGHTSHIFT_STATE": str(settings.state), "NIGHTSHIFT_MODEL": settings.model,
        "NIGHTSHIFT_TRAINING__MIN_VOTES": "40", "NIGHTSHIFT_TRAINING__RANK": "8",
        "NIGHTSHIFT_TRAINING__MAX_ANSWER_TOKENS": "8", "NIGHTSHIFT_TRAINING__BF16": "false",
        "NIGHTSHIFT_TRAINING__PPO": '{"steps": 10000, "rollouts": 8, "minibatch": 4, "kl_budget": 1e9}',
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "trainer", "once", "--request"], env=os.environ | overrides)
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if any(name.startswith("ppo/") for run in runs.list_runs(db) for name in runs.metrics(db, run.id)):
            break
        time.sleep(0.1)
    assert process.poll() is None, "it ended before PPO"
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


def test_after_sigkill_the_next_run_starts_by_itself(
    settings: Settings, db: Database, running: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    running.send_signal(signal.SIGKILL)
    running.wait(timeout=10)
    (dead,) = runs.list_runs(db)
    assert dead.status is RunStatus.RUNNING
    monkeypatch.setattr(runs, "HEARTBEAT_STALE_S", 0.0)
    id = request(db)
    run = job.once(settings)
    assert run is not None
    assert (run.id, run.status) == (id, RunStatus.SUCCEEDED)
    assert runs.get(db, dead.id).status is RunStatus.FAILED
    assert [policy.name for policy in registry.list_policies(db)] == ["policy-0000", "policy-0001"]


def test_ctrl_c_cancels_the_run(db: Database, running: subprocess.Popen[bytes]) -> None:
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=30) == 130
    (run,) = runs.list_runs(db)
    assert run.status is RunStatus.CANCELLED

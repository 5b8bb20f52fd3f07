"""The process that scores answers for the service: which reward model it takes, what it says, how it ends."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from sqlite_utils import Database
from transformers import LlamaConfig, LlamaForCausalLM

from data import learning, registry
from data.database import connect, transaction
from data.ids import new_id
from data.settings import Settings, TrainingSettings
from data.types import Policy, PolicyStatus, timestamp
from tests.conftest import eventually
from trainer.backbone import Backbone
from trainer.encoding import ChatFormat
from trainer.reward_model import RewardModel
from trainer.scorer import CannotScore, Scorer, Server

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def settings(tmp_path: Path, chat: ChatFormat, plain_environment: None) -> Settings:
    """A model of a moment, and a state folder whose path is longer than a socket's may be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, initializer_range=0.2, eos_token_id=[1, 2], pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    chat.tokenizer.save_pretrained(tmp_path / "model")
    training = TrainingSettings(rank=8, alpha=16, bf16=False, max_prompt_tokens=64, max_answer_tokens=32)
    state = tmp_path / ("a" * 100) / "state"
    state.mkdir(parents=True)
    return Settings(state=state, model=str(tmp_path / "model"), training=training)


@pytest.fixture
def db(settings: Settings) -> Iterator[Database]:
    with closing(connect(settings.database)) as connection:
        with transaction(connection):
            connection.execute(
                "INSERT INTO runs (id, status, requested_by, config, created_at) VALUES ('run_1', 'succeeded', 'cli',"
                " '{}', ?)",
                (timestamp(),),
            )
        yield connection


def add_reward_model(settings: Settings, db: Database, *, seed: int = 0, heads: int = 3, rank: int = 8) -> RewardModel:
    """Publish a reward model that says something; as it is in memory."""
    backbone = Backbone.load(settings.model, rank=rank, alpha=16, bf16=False)
    model = RewardModel(backbone, "reward", heads=heads, seed=seed)
    for layer in backbone.adapters.layers.values():
        torch.nn.init.normal_(layer.lora_b["reward"], std=0.1)
    model.shift, model.scale = 0.5, 2.0
    id = new_id("rm")
    path, sha256 = registry.publish_folder(settings.state, id, model.save, parent="reward_models")
    with transaction(db):
        learning.insert_reward_model(db, learning.RewardModelRow(id, "run_1", path, sha256, {}))
    return model


def expected(model: RewardModel, chat: ChatFormat, texts: list[str]) -> list[list[float]]:
    rewards = model.rewards([chat.answer(HELLO, text) for text in texts])
    scores: list[list[float]] = ((rewards - 0.5) / 2.0).tolist()
    return scores


def test_it_says_what_each_head_of_the_newest_reward_model_says(
    settings: Settings, db: Database, chat: ChatFormat
) -> None:
    scorer = Scorer(settings)
    scorer.look()
    assert scorer.reward_model is None
    texts = ["One.", "Two, and more.", "x"]
    for seed in (1, 2, 3):
        model = add_reward_model(settings, db, seed=seed, heads=seed)
        scorer.look()
        newest = learning.reward_models(db)[0]
        assert scorer.reward_model == newest.id
        scores = scorer.score(HELLO, texts)
        assert torch.allclose(torch.tensor(scores), torch.tensor(expected(model, chat, texts)), atol=1e-5)
        assert torch.tensor(scores).std() > 0.01


def test_one_that_cannot_be_loaded_leaves_the_one_before_in_its_place(
    settings: Settings, db: Database, chat: ChatFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = Scorer(settings)
    model = add_reward_model(settings, db)
    scorer.look()
    good = scorer.reward_model

    add_reward_model(settings, db, seed=1)
    damaged = learning.reward_models(db)[0]
    (settings.state / damaged.path / "heads.safetensors").write_bytes(b"damaged")
    scorer.look()
    assert scorer.reward_model == good
    assert scorer.problem is not None
    assert damaged.id in scorer.problem
    assert "sha256" in scorer.problem

    add_reward_model(settings, db, seed=2, rank=16)
    scorer.look()
    assert scorer.reward_model == good
    assert "another rank" in scorer.problem
    assert torch.allclose(
        torch.tensor(scorer.score(HELLO, ["One."])), torch.tensor(expected(model, chat, ["One."])), atol=1e-5
    )
    add_reward_model(settings, db, seed=3)
    scorer.look()
    assert scorer.reward_model != good
    assert scorer.problem is None


def test_one_that_was_mended_is_taken_after_a_while(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_reward_model(settings, db)
    row = learning.reward_models(db)[0]
    heads = settings.state / row.path / "heads.safetensors"
    whole = heads.read_bytes()
    heads.write_bytes(b"damaged")
    scorer = Scorer(settings)
    scorer.look()
    heads.write_bytes(whole)
    scorer.look()
    assert scorer.reward_model is None
    monkeypatch.setattr("trainer.scorer.RETRY_S", 0.0)
    monkeypatch.setattr(scorer, "_retry_at", 0.0)
    scorer.look()
    assert scorer.reward_model == row.id
    assert scorer.problem is None


@pytest.mark.parametrize("status", [PolicyStatus.REJECTED, PolicyStatus.ROLLED_BACK])
def test_one_whose_policy_was_turned_away_scores_no_more(
    settings: Settings, db: Database, status: PolicyStatus
) -> None:
    ids = []
    for number in (1, 2):
        add_reward_model(settings, db, seed=number)
        newest = learning.reward_models(db)[0]
        ids.append(newest.id)
        with transaction(db):
            registry.insert(
                db,
                Policy(
                    f"policy-{number:04d}", None, f"policies/{number}", "", "", PolicyStatus.CANDIDATE, timestamp(),
                    "run_1", newest.id,
                ),
            )  # fmt: skip
    scorer = Scorer(settings)
    scorer.look()
    assert scorer.reward_model == ids[1]
    for number, left in ((2, ids[0]), (1, None)):
        with transaction(db):
            db.execute("UPDATE policies SET status = ? WHERE name = ?", (status, f"policy-{number:04d}"))
        scorer.look()
        assert scorer.reward_model == left
        assert scorer.problem is None


def test_one_whose_policy_was_turned_away_scores_no_more_where_a_newer_one_cannot_be_loaded(
    settings: Settings, db: Database
) -> None:
    add_reward_model(settings, db)
    good = learning.reward_models(db)[0]
    with transaction(db):
        serving = Policy(
            "policy-0001", None, "policies/1", "", "", PolicyStatus.SERVING, timestamp(), "run_1", good.id
        )  # fmt: skip
        registry.insert(db, serving)
    scorer = Scorer(settings)
    scorer.look()
    add_reward_model(settings, db, seed=1)
    damaged = learning.reward_models(db)[0]
    (settings.state / damaged.path / "heads.safetensors").write_bytes(b"damaged")
    scorer.look()
    assert scorer.reward_model == good.id
    with transaction(db):
        db.execute("UPDATE policies SET status = ?", (PolicyStatus.ROLLED_BACK,))
    scorer.look()
    assert scorer.reward_model is None
    assert scorer.problem is not None, "the newest is still not loaded"


def test_a_reward_model_outside_its_folder_is_not_read(settings: Settings, db: Database) -> None:
    add_reward_model(settings, db)
    with transaction(db):
        db.execute("UPDATE reward_models SET path = 'policies/../../elsewhere'")
    row = learning.reward_models(db)[0]
    with pytest.raises(registry.RegistryError, match="outside"):
        learning.checked_folder(settings.state, row)


@pytest.mark.parametrize(
    ("messages", "answers", "why"),
    [
        ([{"role": "user", "content": "x" * 100}], ["One."], "max_prompt_tokens"),
        (HELLO, ["One.", "x" * 100], "max_answer_tokens"),
    ],
)
def test_what_it_was_not_made_for_it_does_not_score(
    settings: Settings, db: Database, messages: list[Any], answers: list[str], why: str
) -> None:
    add_reward_model(settings, db)
    scorer = Scorer(settings)
    scorer.look()
    with pytest.raises(CannotScore, match=why):
        scorer.score(messages, answers)


def test_messages_that_the_chat_template_refuses_are_not_scored(settings: Settings, db: Database) -> None:
    add_reward_model(settings, db)
    tokenizer = Path(settings.model) / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    tokenizer.write_text(refusal + tokenizer.read_text())
    scorer = Scorer(settings)
    scorer.look()
    assert len(scorer.score(HELLO, ["One."])) == 1
    with pytest.raises(CannotScore, match="no system message"):
        scorer.score([{"role": "system", "content": "Be brief."}], ["One."])


# Over the socket


@contextmanager
def connected(settings: Settings) -> Iterator[http.client.HTTPConnection]:
    folder = os.open(settings.state, os.O_PATH | os.O_DIRECTORY)
    try:
        with closing(http.client.HTTPConnection("scorer")) as connection:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(30)
            connection.sock.connect(learning.scorer_address(folder))
            yield connection
    finally:
        os.close(folder)


def ask(settings: Settings, method: str = "GET", body: str | None = None) -> tuple[int, Any]:
    with connected(settings) as connection:
        connection.request(method, "/", body)
        response = connection.getresponse()
        return response.status, json.load(response)


@contextmanager
def serving(settings: Settings, scorer: Any) -> Iterator[None]:
    folder = os.open(settings.state, os.O_PATH | os.O_DIRECTORY)
    with Server(scorer, learning.scorer_address(folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
    os.close(folder)


class StandIn:
    """A reward model that takes its time."""

    def __init__(self) -> None:
        self.reward_model: str | None = "rm_1"
        self.problem: str | None = None
        self.scored: list[list[str]] = []
        self.go_on = threading.Event()

    def look(self) -> None:
        pass

    def score(self, messages: list[Any], answers: list[str]) -> list[list[float]]:
        self.scored.append(answers)
        assert self.go_on.wait(30)
        return [[0.0]] * len(answers)


@pytest.mark.parametrize(
    "body",
    ["", "nonsense", "[]", '{"messages": []}', '{"messages": 3, "answers": ["x"]}', '{"messages": [], "answers": []}'],
)
def test_a_request_that_makes_no_sense_is_told_so(settings: Settings, body: str) -> None:
    with serving(settings, StandIn()):
        status, said = ask(settings, "POST", body)
    assert status == 400
    assert "answers" in said["error"] or "one answer" in said["error"]


def test_who_has_left_is_not_scored_for(settings: Settings) -> None:
    model = StandIn()
    request = json.dumps({"messages": HELLO, "answers": ["%s"]})
    with serving(settings, model), connected(settings) as patient:
        patient.request("POST", "/", request % "patient")
        while not model.scored:
            time.sleep(0.01)
        with connected(settings) as hurried:
            hurried.request("POST", "/", request % "hurried")
        with connected(settings) as last:
            last.request("POST", "/", request % "last")
            model.go_on.set()
            assert patient.getresponse().status == 200
            assert last.getresponse().status == 200
    assert model.scored == [["patient"], ["last"]]


async def test_a_crowd_at_once_waits_in_line(settings: Settings) -> None:
    model, folder = StandIn(), os.open(settings.state, os.O_PATH | os.O_DIRECTORY)
    connector = aiohttp.UnixConnector(learning.scorer_address(folder), limit=0, force_close=True)
    with serving(settings, model):
        async with aiohttp.ClientSession(connector=connector) as http:

            async def one() -> int:
                async with http.post("http://scorer/", json={"messages": HELLO, "answers": ["Hi."]}) as response:
                    return response.status

            crowd = [asyncio.create_task(one()) for _ in range(64)]
            await eventually(lambda: model.scored)
            await asyncio.sleep(0.2)  # all have come
            model.go_on.set()
            assert await asyncio.gather(*crowd) == [200] * 64
    os.close(folder)


def test_without_a_reward_model_it_says_so_and_why(settings: Settings) -> None:
    model = StandIn()
    model.reward_model = None
    with serving(settings, model):
        assert ask(settings) == (404, {"reward_model": None, "problem": None})
        status, said = ask(settings, "POST", "x" * 10_000_000)  # sent whole before the answer is read
        assert (status, "train first" in said["error"]) == (404, True)
        model.problem = "rm_1 cannot be loaded: torn"
        assert ask(settings, "POST", "{}") == (404, {"error": model.problem})


# As a process


@contextmanager
def scorer_process(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"NIGHTSHIFT_STATE": str(settings.state), "NIGHTSHIFT_MODEL": settings.model}
    environment |= {f"NIGHTSHIFT_TRAINING__{k.upper()}": str(getattr(settings.training, k)) for k in ("rank", "alpha")}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "scorer"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until_it_says(settings: Settings, status: int) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError):
            said = ask(settings)
            if said[0] == status:
                return said[1]
        time.sleep(0.05)
    raise AssertionError("it never did")


def test_the_process_waits_for_a_reward_model_takes_it_and_ends_in_order(settings: Settings, db: Database) -> None:
    with scorer_process(settings) as process:
        until_it_says(settings, 404)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps, "nobody needs torch before there is a reward model"
        with scorer_process(settings) as second:
            assert second.wait(60) == 1
        add_reward_model(settings, db)
        newest = learning.reward_models(db)[0]
        assert until_it_says(settings, 200) == {"reward_model": newest.id, "problem": None}
        status, said = ask(settings, "POST", json.dumps({"messages": HELLO, "answers": ["One.", "Two."]}))
        assert (status, len(said["scores"]), len(said["scores"][0])) == (200, 2, 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not (settings.state / learning.SCORER_SOCKET).exists()


def test_a_scorer_that_was_killed_is_followed_by_the_next(settings: Settings, db: Database) -> None:
    with scorer_process(settings) as first:
        until_it_says(settings, 404)
        first.kill()
        first.wait()
    assert (settings.state / learning.SCORER_SOCKET).exists()
    with scorer_process(settings):
        until_it_says(settings, 404)

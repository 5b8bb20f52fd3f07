import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from trainer import rollout
from trainer.backbone import Backbone
from trainer.rollout import EngineError, EngineSampler, LocalSampler, Sampling

MakeBackbone = Callable[..., Backbone]
QUERIES = [(3, 4, 5), (6,), (7, 8, 9, 10, 11, 12), (3,), (9, 9)]
SAMPLING = Sampling(max_tokens=12, temperature=0.9, end_ids=frozenset({2, 4}))


def one_by_one(backbone: Backbone, query: tuple[int, ...], seed: int) -> list[int]:
    """The same draws from the whole model, with neither cache nor batch nor padding."""
    draws = torch.rand(SAMPLING.max_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = list(query)
    for draw in draws:
        with torch.no_grad(), backbone.adapters.on("policy"):
            logits = backbone.base(input_ids=torch.tensor([tokens])).logits[0, -1]
        cumulative = torch.softmax(logits / SAMPLING.temperature, dim=0).cumsum(0)
        tokens.append(int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True)))
        if tokens[-1] in SAMPLING.end_ids:
            break
    return tokens[len(query) :]


def test_a_batch_samples_what_each_query_would_alone(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("policy")
    queries, seeds = QUERIES * 4, range(20)
    answers = LocalSampler(backbone, "policy", SAMPLING, rows=7)(queries, seeds)
    for answer, query, seed in zip(answers, queries, seeds, strict=True):
        assert answer.query == query
        assert list(answer.response) == one_by_one(backbone, query, seed)
        assert answer.finished == (answer.response[-1] in SAMPLING.end_ids)
    assert 0 < sum(a.finished for a in answers) < 20
    assert len({len(a.response) for a in answers}) > 3


def test_an_answer_stops_at_the_limit(tiny_backbone: MakeBackbone) -> None:
    sampling = Sampling(max_tokens=5, end_ids=frozenset())
    answers = LocalSampler(tiny_backbone(), None, sampling)(QUERIES, range(5))
    assert [len(a.response) for a in answers] == [5] * 5
    assert not any(a.finished for a in answers)


class Engine(ThreadingHTTPServer):
    """Speaks vLLM's wire as far as rollouts use it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[tuple[str, dict]] = []
        self.loaded: dict[str, str] = {}
        self.busy = self.busiest = 0
        self.refusals = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine = self.server
        with engine.lock:
            engine.bodies.append((self.path, body))
            engine.busy += 1
            engine.busiest = max(engine.busiest, engine.busy)
            refused = engine.refusals > 0 and self.path == "/v1/completions"
            engine.refusals -= refused
        if refused:
            self.answer(503, {"error": {"message": "queue is full"}})
        elif self.path == "/v1/load_lora_adapter":
            assert Path(body["lora_path"], "adapter_model.safetensors").exists()
            engine.loaded[body["lora_name"]] = body["lora_path"]
            self.answer(200, {})
        elif self.path == "/v1/unload_lora_adapter":
            del engine.loaded[body["lora_name"]]
            self.answer(200, {})
        elif body["model"] not in engine.loaded:
            self.answer(404, {"error": {"message": f"The model {body['model']} does not exist."}})
        else:
            time.sleep(0.02)
            tokens = [body["seed"] % 20 + 5, 2]
            choice = {"token_ids": tokens, "logprobs": {"token_logprobs": [-0.5, -0.25]}, "text": "?"}
            self.answer(200, {"choices": [choice]})

    def answer(self, status: int, body: dict) -> None:
        with self.server.lock:
            self.server.busy -= 1
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def engine_sampler(engine: Engine, tiny_backbone: MakeBackbone, tmp_path: Path) -> EngineSampler:
    return EngineSampler(
        tiny_backbone("policy"), "policy", SAMPLING, url=f"http://127.0.0.1:{engine.server_port}",
        folder=tmp_path / "run_1", accelerator=Accelerator(), in_flight=3,
    )  # fmt: skip


def test_the_engine_answers_with_tokens_and_its_logprobs(engine: Engine, engine_sampler: EngineSampler) -> None:
    answers = engine_sampler(QUERIES * 3, range(15))
    assert [a.query for a in answers] == QUERIES * 3
    assert [a.response for a in answers] == [(seed % 20 + 5, 2) for seed in range(15)]
    assert all(a.finished and a.sampler_logprobs == (-0.5, -0.25) for a in answers)
    assert engine.busiest <= 3
    path, body = engine.bodies[1]
    assert path == "/v1/completions"
    assert body["prompt"] == list(QUERIES[body["seed"] % 5])
    assert body["priority"] > 0
    assert (body["temperature"], body["max_tokens"]) == (0.9, 12)
    assert (body["top_p"], body["top_k"]) == (1.0, 0)
    assert body["stop_token_ids"] == [2, 4]
    assert body["return_token_ids"]


def test_every_call_publishes_the_adapter_under_a_new_name_and_cleans_up(
    engine: Engine, engine_sampler: EngineSampler, tmp_path: Path
) -> None:
    for _ in range(2):
        engine_sampler(QUERIES, range(5))
    names = [body["lora_name"] for path, body in engine.bodies if path == "/v1/load_lora_adapter"]
    assert len(set(names)) == 2
    assert not engine.loaded
    assert list((tmp_path / "run_1").iterdir()) == []


def test_a_full_queue_is_waited_for(
    engine: Engine, engine_sampler: EngineSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "RETRY_SECONDS", (0.01, 0.01))
    engine.refusals = 2
    assert len(engine_sampler(QUERIES, range(5))) == 5


def test_a_queue_that_stays_full_ends_with_what_the_engine_said(
    engine: Engine, engine_sampler: EngineSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "RETRY_SECONDS", (0.01,))
    engine.refusals = 100
    with pytest.raises(EngineError, match=r"answered 503: .*queue is full"):
        engine_sampler(QUERIES, range(5))


def test_an_engine_that_is_not_there_is_named(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    sampler = EngineSampler(
        tiny_backbone("policy"), "policy", SAMPLING, url="http://127.0.0.1:1", folder=tmp_path,
        accelerator=Accelerator(),
    )  # fmt: skip
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1/v1/load_lora_adapter cannot be reached"):
        sampler(QUERIES, range(5))

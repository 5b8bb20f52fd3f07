import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from trainer import rollout
from trainer.backbone import Backbone
from trainer.rollout import Engine, EngineError, EngineSampler, LocalSampler, Query, Sampling, forget_leftovers

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


@pytest.mark.parametrize("most", [{"rows": 7}, {"tokens": 100}])
def test_a_batch_samples_what_each_query_would_alone(tiny_backbone: MakeBackbone, most: dict[str, int]) -> None:
    backbone = tiny_backbone("policy")
    queries, seeds = QUERIES * 4, range(20)
    answers = LocalSampler(backbone, "policy", SAMPLING, **most)(queries, seeds)
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


def test_long_queries_are_not_all_read_at_once(tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, read = tiny_backbone(), []
    sample = LocalSampler._sample

    def noted(self: LocalSampler, queries: list[Query], seeds: list[int]) -> list[list[int]]:
        read.append(len(queries) * max(map(len, queries)))
        return sample(self, queries, seeds)

    monkeypatch.setattr(LocalSampler, "_sample", noted)
    sampling = Sampling(max_tokens=1, end_ids=frozenset())
    LocalSampler(backbone, None, sampling, tokens=400)([(3,) * 20] * 12 + [(4,)] * 12, range(24))
    assert max(read) == 100


class FakeEngine(ThreadingHTTPServer):
    """Speaks vLLM's wire as far as the trainer uses it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = ""
        self.bodies: list[tuple[str, dict]] = []
        self.loaded: dict[str, str] = {}
        self.busy = self.busiest = 0
        self.full = 0
        """So many more completions are answered `full_status`."""
        self.full_status = 503
        self.refuse_after = 10**9
        """Completions after so many are answered 400."""
        self.restart_after = 10**9
        """After so many more completions it breaks off, and comes back without its adapters."""
        self.broken = b""
        """What it says to whoever asks for its metrics, instead of HTTP."""
        self.people = 0
        """Requests that somebody else has running."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeEngine

    def do_GET(self) -> None:
        if self.path == "/metrics" and self.server.broken:
            self.wfile.write(self.server.broken)
        elif self.path == "/metrics":
            lines = [
                "# TYPE vllm:num_requests_running gauge",
                f'vllm:num_requests_running{{engine="0",model_name="base"}} {self.server.people:.1f}',
                f'vllm:num_requests_waiting{{engine="0",model_name="base"}} {self.server.busy:.1f}',
                'vllm:num_requests_waiting_by_reason{engine="0",model_name="base",reason="capacity"} 7.0',
            ]
            self.answer(200, "\n".join(lines).encode())
        elif self.permitted():
            self.answer(200, {"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine = self.server
        if not self.permitted():
            return
        with engine.lock:
            engine.bodies.append((self.path, body))
            engine.busy += 1
            engine.busiest = max(engine.busiest, engine.busy)
            completion = self.path == "/v1/completions"
            full = engine.full > 0 and completion
            engine.full -= full
            engine.refuse_after -= completion
            engine.restart_after -= completion
            if restarts := engine.restart_after == 0:
                engine.loaded.clear()
        try:
            status, answer = self.respond(body, full=full)
        finally:
            with engine.lock:
                engine.busy -= 1
        if not restarts:
            self.answer(status, answer)

    def respond(self, body: dict, *, full: bool) -> tuple[int, dict]:
        engine = self.server
        if full:
            return engine.full_status, {"error": {"message": "queue is full"}}
        if self.path == "/v1/load_lora_adapter":
            assert Path(body["lora_path"], "adapter_model.safetensors").exists()
            engine.loaded[body["lora_name"]] = body["lora_path"]
            return 200, {}
        if self.path == "/v1/unload_lora_adapter":
            return 200 if engine.loaded.pop(body["lora_name"], None) else 404, {}
        if body["model"] not in engine.loaded:
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        if engine.refuse_after < 0:
            return 400, {"error": {"message": "the prompt is too long"}}
        folder = Path(engine.loaded[body["model"]])
        time.sleep(0.02)
        assert folder.exists(), "its folder went before its last request"
        tokens = [body["seed"] % 20 + 5, 2]
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": [-0.5, -0.25]}, "text": "?"}
        return 200, {"choices": [choice]}

    def permitted(self) -> bool:
        key = self.server.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self.answer(401, {"error": "Unauthorized"})
            return False
        return True

    def answer(self, status: int, body: dict | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def running_engine() -> Iterator[FakeEngine]:
    with FakeEngine() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with running_engine() as server:
        yield server


@pytest.fixture
def engine_sampler(engine: FakeEngine, tiny_backbone: MakeBackbone, tmp_path: Path) -> EngineSampler:
    return EngineSampler(
        tiny_backbone("policy"), "policy", SAMPLING, engine=Engine(engine.url), home=tmp_path / "rollouts",
        name="rollout-run_1", accelerator=Accelerator(), in_flight=3,
    )  # fmt: skip


def test_the_engine_answers_with_tokens_and_its_logprobs(engine: FakeEngine, engine_sampler: EngineSampler) -> None:
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
    engine: FakeEngine, engine_sampler: EngineSampler, tmp_path: Path
) -> None:
    for _ in range(2):
        engine_sampler(QUERIES, range(5))
    names = [body["lora_name"] for path, body in engine.bodies if path == "/v1/load_lora_adapter"]
    assert len(set(names)) == 2
    assert not engine.loaded
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_a_relative_folder_reaches_the_engine_as_an_absolute_one(
    engine: FakeEngine, tiny_backbone: MakeBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sampler = EngineSampler(
        tiny_backbone("policy"), "policy", SAMPLING, engine=Engine(engine.url), home=Path("var/rollouts"), name="r",
        accelerator=Accelerator(),
    )  # fmt: skip
    sampler(QUERIES, range(5))
    assert engine.bodies[0][1]["lora_path"] == str(tmp_path / "var/rollouts/r-00000")


def test_a_full_queue_is_waited_for(
    engine: FakeEngine, engine_sampler: EngineSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "RETRY_SECONDS", (0.01, 0.01))
    engine.full = 2
    assert len(engine_sampler(QUERIES, range(5))) == 5


@pytest.mark.parametrize("status", [503, 500], ids=["full", "its core has died"])
def test_an_engine_that_answers_no_request_for_longer_is_asked_anew(
    engine: FakeEngine, engine_sampler: EngineSampler, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(rollout, "RETRY_SECONDS", ())
    monkeypatch.setattr(rollout, "RESTART_SECONDS", (0.01,) * 10)
    engine.full, engine.full_status = 3, status
    assert len(engine_sampler(QUERIES, range(5))) == 5


def test_a_queue_that_stays_full_ends_with_what_the_engine_said(
    engine: FakeEngine, engine_sampler: EngineSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(rollout, "RESTART_SECONDS", (0.01,))
    engine.full = 100
    with pytest.raises(EngineError, match=r"answered 503: .*queue is full"):
        engine_sampler(QUERIES, range(5))


def test_an_engine_that_starts_again_is_waited_for_and_told_of_the_adapter_anew(
    engine: FakeEngine, engine_sampler: EngineSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "RESTART_SECONDS", (0.01,))
    engine.restart_after = 4
    assert [a.response for a in engine_sampler(QUERIES, range(5))] == [(seed % 20 + 5, 2) for seed in range(5)]
    assert sum(path == "/v1/load_lora_adapter" for path, _ in engine.bodies) == 2
    assert not engine.loaded


def test_after_a_refusal_nothing_of_the_adapter_is_left_and_nothing_was_taken_from_a_running_request(
    engine: FakeEngine, engine_sampler: EngineSampler, tmp_path: Path
) -> None:
    engine.refuse_after = 7
    with pytest.raises(EngineError, match=r"answered 400: .*too long"):
        engine_sampler(QUERIES * 4, range(20))
    assert not engine.loaded
    assert engine.busy == 0
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_an_interrupt_leaves_nothing_of_the_adapter(
    engine: FakeEngine, engine_sampler: EngineSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine_sampler(QUERIES, range(5))
    assert not engine.loaded
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_an_engine_that_is_not_there_is_named_and_no_folder_stays(
    tiny_backbone: MakeBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "RESTART_SECONDS", (0.01,))
    sampler = EngineSampler(
        tiny_backbone("policy"), "policy", SAMPLING, engine=Engine("http://127.0.0.1:1"), home=tmp_path / "rollouts",
        name="r", accelerator=Accelerator(),
    )  # fmt: skip
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1/v1/load_lora_adapter cannot be reached"):
        sampler(QUERIES, range(5))
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_what_a_dead_run_left_is_unloaded_and_removed(engine: FakeEngine, tmp_path: Path) -> None:
    home = tmp_path / "rollouts"
    for name in ("rollout-run_1-00003", "rollout-run_1-00004"):
        (home / name).mkdir(parents=True)
        (home / name / "adapter_model.safetensors").touch()
    Engine(engine.url).load("rollout-run_1-00004", home / "rollout-run_1-00004")
    forget_leftovers(home, Engine(engine.url))
    assert not engine.loaded
    assert not home.exists()
    forget_leftovers(home, None)


def test_an_engine_asks_for_its_key(engine: FakeEngine) -> None:
    engine.key = "secret"
    Engine(engine.url, "secret").check()
    with pytest.raises(EngineError, match="401"):
        Engine(engine.url, "guess").check()


def test_requests_are_those_that_run_and_those_that_wait(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "METRICS_S", 60.0)
    engine.people, engine.busy = 2, 1
    assert Engine(engine.url).requests() == 3
    engine.people, engine.busy = 0, 0
    assert Engine(engine.url).requests() == 0
    assert Engine("http://127.0.0.1:1").requests() == 0, "who cannot be asked is not waited for"


@pytest.mark.parametrize(
    "said",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nvllm:num", b"what?\r\n\r\n",
     b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 100\r\n\r\n"],
    ids=["broken off", "no HTTP", "an error broken off"],
)  # fmt: skip
def test_an_engine_that_breaks_off_is_one_that_cannot_be_asked(engine: FakeEngine, said: bytes) -> None:
    engine.broken, engine.people = said, 1
    assert Engine(engine.url).requests() == 0

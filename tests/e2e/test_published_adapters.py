"""What the trainer publishes, real vLLM serves: under the product's own flags its answers have the trainer's own
log-probabilities, and sampling from it leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from data.settings import STARTER, Settings
from service.supervisor import engine_command, engine_environment, free_port
from tests.e2e.conftest import START_LIMIT_S, descendants, wait_until
from trainer.backbone import Backbone
from trainer.encoding import collate
from trainer.rollout import Engine, EngineError, EngineSampler, Sampling

KEY = "the-key-of-this-engine"
CONTEXT = 8192
SIZES = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.1, "max_position_embeddings": CONTEXT,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=20.0, query_pre_attn_scalar=64,
    ),
}  # fmt: skip
QUERIES = [tuple(range(10, 10 + length)) for length in (1, 3, 9, 30, 60)] * 8
SAMPLING = Sampling(max_tokens=24, temperature=0.7, end_ids=frozenset(range(1, 60)))


@dataclass(frozen=True, slots=True)
class Served:
    """A random model of a family in the trainer, with an adapter that matters, and the same model in vLLM."""

    backbone: Backbone
    engine: Engine
    home: Path

    def sampler(self, name: str) -> EngineSampler:
        return EngineSampler(
            self.backbone, "policy", SAMPLING, engine=self.engine, home=self.home, name=name, accelerator=Accelerator()
        )

    def models(self) -> set[str]:
        request = urllib.request.Request(f"{self.engine.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return {model["id"] for model in json.loads(answer.read())["data"]}


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    config: PretrainedConfig = FAMILIES[request.param]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder / "model")
    backbone = Backbone.load(folder / "model", rank=8, alpha=16, bf16=False)
    backbone.adapters.add("policy")
    for layer in backbone.adapters.layers.values():
        torch.nn.init.normal_(layer.lora_b["policy"], std=0.1)

    settings = Settings(state=folder / "state", model=str(folder / "model"))
    engine = Engine(f"http://127.0.0.1:{free_port()}", KEY)
    command = engine_command(settings, folder / "model", int(engine.url.rpartition(":")[2]))
    environment = os.environ | engine_environment(settings) | {"VLLM_API_KEY": KEY}
    log = folder / "engine.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            engine.check()
        except EngineError:
            return False
        return True

    try:
        wait_until(ready, START_LIMIT_S, "vLLM answers")
        yield Served(backbone, engine, folder / "rollouts")
    finally:
        children = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            for pid in [process.pid, *children]:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)


def test_answers_under_the_adapter_have_the_trainers_own_logprobs(served: Served) -> None:
    answers = served.sampler("sampled")(QUERIES, range(len(QUERIES)))
    batch = collate(answers)
    with torch.no_grad():
        with served.backbone.adapters.on("policy"):
            ours = served.backbone.logprobs(batch, temperature=SAMPLING.temperature)
        bare = served.backbone.logprobs(batch, temperature=SAMPLING.temperature)
    assert [answer.query for answer in answers] == QUERIES
    assert {answer.finished for answer in answers} == {True, False}
    furthest = 0.0
    for answer, own in zip(answers, ours, strict=True):
        assert answer.finished == (answer.response[-1] in SAMPLING.end_ids)
        assert answer.finished or len(answer.response) == SAMPLING.max_tokens
        theirs = torch.tensor(answer.sampler_logprobs)
        furthest = max(furthest, float((own[: len(theirs)] - theirs).abs().max()))
    assert furthest < 1e-3
    assert (ours - bare).abs().max() > 0.1, "an adapter that changes nothing would prove nothing"


def test_nothing_of_an_adapter_stays_after_its_answers(served: Served) -> None:
    served.sampler("passing")(QUERIES[:4], range(4))
    assert served.models() == {"base"}
    assert list(served.home.iterdir()) == []


def test_a_refused_request_is_an_engine_error_and_nothing_of_the_adapter_stays(served: Served) -> None:
    too_long = (10,) * (CONTEXT + 1)
    with pytest.raises(EngineError, match=r"/v1/completions answered 400: .*context length"):
        served.sampler("refused")([*QUERIES, too_long, *QUERIES], range(2 * len(QUERIES) + 1))
    assert served.models() == {"base"}
    assert list(served.home.iterdir()) == []
    assert len(served.sampler("after")(QUERIES[:4], range(4))) == 4


def test_the_engine_says_whether_somebody_is_answered_even_after_they_left(served: Served) -> None:
    """Someone who leaves in the middle must not keep training waiting for ever."""
    assert served.engine.requests() == 0
    host, port = served.engine.url.removeprefix("http://").split(":")
    body = {"model": "base", "prompt": [10], "max_tokens": CONTEXT - 8, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
        while b"data: " not in connection.recv(65536):
            pass
        wait_until(lambda: served.engine.requests() == 1, 10, "a request is running")
    wait_until(lambda: served.engine.requests() == 0, 10, "the request has gone with who sent it")

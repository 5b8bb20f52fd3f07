"""Samples answers: `local` in the trainer, or `engine` from a running vLLM, behind one signature.

A sampler takes queries and one seed for each, and returns one answer each, in order. What a seed gives does
not depend on which other queries are sampled beside it, so a run can be repeated on any number of processes.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from data.http import open_directly
from trainer.backbone import Backbone
from trainer.encoding import Answer, by_length

LOW_PRIORITY = 10
"""vLLM serves smaller numbers first; people's requests have 0."""

METRICS_S = 1.0
"""What an engine gets to say how busy it is: training does not stand still for that."""
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)
"""How long to wait, time after time, while the engine's queue is full."""
RESTART_SECONDS = (5, 10, 20, 40, 80, 160)
"""How long to wait, time after time, for an engine that cannot be reached: it may be starting again."""

Query = tuple[int, ...]
Sampler = Callable[[Sequence[Query], Sequence[int]], list[Answer]]


class EngineError(Exception):
    """The engine did not do what a rollout needs; the message says what it answered."""


class EngineAway(EngineError):
    """The engine cannot be reached, broke off in the middle of an answer, or has forgotten the adapter: it may be
    starting again, or have done so."""


class EngineFull(EngineError):
    """The engine's queue is full of people's requests, which come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    max_tokens: int
    """An answer that has not ended by then is cut off."""
    temperature: float = 1.0
    """Logits are divided by this, here as in the trainer."""
    end_ids: frozenset[int]
    """The tokens that end an answer; none: every answer has `max_tokens` tokens."""


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that is allocated once."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, _ = key_states.shape
        self._keys = key_states.new_empty(rows, heads, self._capacity, key_states.shape[-1])
        self._values = value_states.new_empty(rows, heads, self._capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[2]
        self._keys[:, :, start : self._length] = key_states
        self._values[:, :, start : self._length] = value_states
        return self._keys[:, :, : self._length], self._values[:, :, : self._length]

    def get_seq_length(self) -> int:
        return self._length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in place: `indices` may differ from 0, 1, 2, ... only in rows that come from behind."""
        holes = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for buffer in (self._keys, self._values):
            buffer[holes, :, : self._length] = buffer[indices[holes], :, : self._length]
        self._keys, self._values = self._keys[: len(indices)], self._values[: len(indices)]


class LocalSampler:
    """Batched generation on the backbone itself; finished answers leave the batch."""

    def __init__(
        self, backbone: Backbone, adapter: str | None, sampling: Sampling, *, rows: int = 256, tokens: int | None = None
    ) -> None:
        """
        Args:
            adapter: whose answers; None for the reference's.
            rows: how many answers are written at once, at most.
            tokens: of all of them together, queries and padding included: what the cache has room for; by default
                65,536 on a CPU and four times as many on a GPU. Of queries alone a fourth: they are read all at once.
        """
        self._backbone = backbone
        self._adapter = adapter
        self._sampling = sampling
        self._rows = rows
        self._tokens = tokens or (2**16 if backbone.device.type == "cpu" else 2**18)

    def __call__(self, queries: Sequence[Query], seeds: Sequence[int]) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(queries)
        longest = [max(len(query) + self._sampling.max_tokens, 4 * len(query)) for query in queries]
        with self._backbone.adapters.merged(self._adapter):
            for rows in by_length(longest, self._tokens, rows=self._rows):
                sampled = self._sample([queries[i] for i in rows], [seeds[i] for i in rows])
                for i, response in zip(rows, sampled, strict=True):
                    finished = response[-1] in self._sampling.end_ids
                    answers[i] = Answer(queries[i], tuple(response), finished)
        return [answer for answer in answers if answer is not None]

    def _sample(self, queries: list[Query], seeds: list[int]) -> list[list[int]]:
        backbone, sampling = self._backbone, self._sampling
        longest = max(map(len, queries))
        capacity = longest + sampling.max_tokens
        cache = Cache(layers=[_GrowingLayer(capacity) for _ in range(backbone.layers)])
        ids = torch.tensor([[0] * (longest - len(q)) + list(q) for q in queries], device=backbone.device)
        lengths = torch.tensor([len(q) for q in queries], device=backbone.device)
        # Padding is on the left, and positions count from each query's own first token.
        attention = torch.arange(capacity, device=backbone.device) >= longest - lengths[:, None]
        positions = (torch.arange(longest, device=backbone.device) - (longest - lengths[:, None])).clamp(min=0)
        draws = torch.stack([_uniforms(seed, sampling.max_tokens) for seed in seeds]).to(backbone.device)
        end = torch.tensor(sorted(sampling.end_ids), device=backbone.device)

        responses: list[list[int]] = [[] for _ in queries]
        owners = list(range(len(queries)))  # which query each row of the batch belongs to
        going = torch.ones(len(queries), dtype=torch.bool, device=backbone.device)
        for step in range(sampling.max_tokens):
            tokens = self._draw(ids, attention[:, : longest + step], positions, cache, draws[:, step])
            for i, token, wanted in zip(owners, tokens.tolist(), going.tolist(), strict=True):
                if wanted:
                    responses[i].append(token)
            going &= ~torch.isin(tokens, end)
            if not going.any():
                break
            # Leaving costs a copy of rows of the cache, so it waits until an eighth of the batch can leave.
            if going.sum() <= 0.875 * len(owners):
                kept = _fill_holes(going)
                owners = [owners[row] for row in kept.tolist()]
                cache.batch_select_indices(kept)
                tokens, attention, lengths, draws = tokens[kept], attention[kept], lengths[kept], draws[kept]
                going = going[kept]
            ids, positions = tokens[:, None], (lengths + step)[:, None]
        return responses

    def _draw(self, ids: Tensor, attention: Tensor, positions: Tensor, cache: Cache, draws: Tensor) -> Tensor:
        """(B,) the next token of each row, by inverting its cumulative distribution at `draws` (B,)."""
        hidden = self._backbone.next_hidden(ids, attention, positions, cache)
        probabilities = torch.softmax(self._backbone.logits(hidden) / self._sampling.temperature, dim=-1)
        cumulative = probabilities.double().cumsum(dim=-1)
        tokens = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(dim=-1)
        return tokens.clamp(max=probabilities.shape[-1] - 1)


def _fill_holes(going: Tensor) -> Tensor:
    """The rows that go on, in an order in which only those from behind move: into the places of finished ones."""
    count = int(going.sum())
    order = torch.arange(count, device=going.device)
    order[~going[:count]] = going[count:].nonzero()[:, 0] + count
    return order


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Engine:
    """A running vLLM, spoken to over HTTP. What it refuses, or does not answer, raises EngineError."""

    url: str
    """Its root, such as http://127.0.0.1:8001."""
    key: str = ""
    """What it takes as the API key; empty: it asks for none."""

    def check(self) -> None:
        """Raise EngineError unless it is there and takes the key."""
        self._ask("/v1/models", timeout_s=10)

    def load(self, name: str, folder: Path) -> None:
        """Make the adapter in `folder` known as the model `name`; the engine reads the same path."""
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, timeout_s=300)

    def unload(self, name: str) -> None:
        self._ask("/v1/unload_lora_adapter", {"lora_name": name}, timeout_s=30)

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """The one choice that answers a request for a completion."""
        choice: dict[str, Any] = json.loads(self._ask("/v1/completions", request, timeout_s=600))["choices"][0]
        return choice

    def requests(self) -> int:
        """How many requests it works on or keeps waiting, whoever sent them; 0 where it cannot be asked."""
        try:
            lines = self._ask("/metrics", timeout_s=METRICS_S).decode().splitlines()
        except EngineError:
            return 0
        gauges = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(gauges))

    def _ask(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = self.url.rstrip("/") + path
        request = Request(url, None if body is None else json.dumps(body).encode(), headers)
        try:
            try:
                with open_directly(request, timeout=timeout_s) as answer:
                    return bytes(answer.read())
            except HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                # vLLM whose core has died says 500 for a moment, and 404 of an adapter when it is back.
                kind = EngineFull if error.code == 503 else EngineError
                if path == "/v1/completions" and error.code in (404, 500):
                    kind = EngineAway
                raise kind(f"{url} answered {error.code}: {said}") from error
        except (OSError, HTTPException) as error:
            raise EngineAway(f"{url} cannot be reached: {error or type(error).__name__}") from error


class EngineSampler:
    """Generation by a running vLLM, on the adapter as it is now.

    The adapter is published under a new name for every call, since vLLM caches by name, and forgotten afterwards,
    whatever happens. vLLM's priority orders its queue but does not preempt what runs, so only `in_flight` requests
    are out at once. An engine that starts again meanwhile has forgotten the adapter: the call then begins anew.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: str,
        sampling: Sampling,
        *,
        engine: Engine,
        home: Path,
        name: str,
        accelerator: Accelerator,
        in_flight: int = 32,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            home: the folder where adapters are published for the time of a call; the engine reads the same path.
            name: the adapters' names begin with it; nobody else's may.
            in_flight: requests out at once, over all processes.
            sleep: waits so many seconds for an engine that is away or full; what it raises ends the call.
        """
        self._backbone = backbone
        self._adapter = adapter
        self._sampling = sampling
        self._engine = engine
        self._home = home.resolve()
        self._name = name
        self._accelerator = accelerator
        self._in_flight = max(1, in_flight // accelerator.num_processes)
        self._sleep = sleep
        self._calls = 0

    def __call__(self, queries: Sequence[Query], seeds: Sequence[int]) -> list[Answer]:
        """
        Raises:
            EngineError: the engine refused a request, or could not be reached or was full for minutes.
        """
        waits = iter(RESTART_SECONDS)
        while True:
            try:
                return self._call(queries, seeds)
            except (EngineAway, EngineFull):
                wait = next(waits, None)
                if wait is None:
                    raise
                self._sleep(wait)

    def _call(self, queries: Sequence[Query], seeds: Sequence[int]) -> list[Answer]:
        name = f"{self._name}-{self._calls:05d}"
        self._calls += 1
        try:
            answers = self._sample(name, queries, seeds)
        except BaseException:
            with suppress(EngineError):  # what went wrong first is what matters
                self._forget(name)
            raise
        self._forget(name)
        return answers

    def _sample(self, name: str, queries: Sequence[Query], seeds: Sequence[int]) -> list[Answer]:
        if self._accelerator.is_main_process:
            self._backbone.publish(self._adapter, self._home / name)
            self._engine.load(name, self._home / name)
        self._accelerator.wait_for_everyone()
        with ThreadPoolExecutor(self._in_flight) as threads:
            answers = self._ask_all(threads, name, queries, seeds)
        self._accelerator.wait_for_everyone()
        return answers

    def _ask_all(
        self, threads: ThreadPoolExecutor, name: str, queries: Sequence[Query], seeds: Sequence[int]
    ) -> list[Answer]:
        """What finds the queue full is asked again, for as long as it is not full all the time. The wait is in this
        thread, which alone hears that the run is to end."""
        answers: dict[int, Answer] = {}
        waits = iter(RETRY_SECONDS)
        while left := [i for i in range(len(queries)) if i not in answers]:
            tried = list(threads.map(lambda i: self._answer(name, queries[i], seeds[i]), left))
            refused = [refusal for refusal in tried if isinstance(refusal, EngineFull)]
            answers |= {i: answer for i, answer in zip(left, tried, strict=True) if isinstance(answer, Answer)}
            if len(refused) < len(left):
                waits = iter(RETRY_SECONDS)
            if refused:
                wait = next(waits, None)
                if wait is None:
                    raise refused[0]
                self._sleep(wait)
        return [answers[i] for i in range(len(queries))]

    def _forget(self, name: str) -> None:
        # Nothing reads the folder any more: the threads have ended, and so has every request on the adapter.
        if self._accelerator.is_main_process:
            try:
                self._engine.unload(name)
            finally:
                shutil.rmtree(self._home / name, ignore_errors=True)

    def _answer(self, model: str, query: Query, seed: int) -> Answer | EngineFull:
        request = {
            "model": model,
            "prompt": list(query),
            "max_tokens": self._sampling.max_tokens,
            "temperature": self._sampling.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "seed": seed,
            "ignore_eos": True,  # only what follows ends an answer, as it does in the trainer
            "stop_token_ids": sorted(self._sampling.end_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "priority": LOW_PRIORITY,
        }
        try:
            choice = self._engine.complete(request)
        except EngineFull as refusal:
            return refusal
        response = tuple(choice["token_ids"])
        logprobs = tuple(choice["logprobs"]["token_logprobs"])
        if len(response) != len(logprobs):
            raise EngineError(f"{self._engine.url} answered {len(response)} tokens with {len(logprobs)} logprobs")
        return Answer(query, response, response[-1] in self._sampling.end_ids, logprobs)


def forget_leftovers(home: Path, engine: Engine | None) -> None:
    """Unload and remove the adapters of a run that died while an engine sampled for it."""
    for folder in home.glob("*"):
        if engine is not None:
            with suppress(EngineError):  # it has been restarted since, or is not there
                engine.unload(folder.name)
    shutil.rmtree(home, ignore_errors=True)

"""A stand-in for vLLM's OpenAI server: its HTTP, its bytes, and a fixed schedule instead of a model.

What an answer costs here is known to the millisecond, so whatever a gateway adds shows. Written on bare asyncio: its
own share of a request must be small beside what is measured. Run as `python bench/mock_upstream.py --port PORT`."""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, cast

import httptools

FIRST_TOKEN_S = 0.020
BETWEEN_TOKENS_S = 0.005
TOKENS = 24
"""Each answer takes 135 ms, streamed or not."""
ANSWER_S = FIRST_TOKEN_S + (TOKENS - 1) * BETWEEN_TOKENS_S
PROMPT_TOKENS = 40

WORDS = [" the", " sea", " is", " calm", " and", " a", " small", " boat", ",", " far", " out", "."]
FINGERPRINT = "vllm-0.32.0-e33e29d0"
USAGE = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS + TOKENS, "completion_tokens": TOKENS}


class Upstream(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, loras: dict[str, str]) -> None:
        self._loras = loras

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    # What the parser calls

    def on_message_begin(self) -> None:
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url == b"/health":
            self._respond(b"", "text/plain")
        elif self._url == b"/v1/models":
            models = [{"id": name, "object": "model", "root": root} for name, root in self._loras.items()]
            base = {"id": "base", "object": "model", "root": "base", "max_model_len": 2048}
            self._json({"object": "list", "data": [base, *models]})
        elif self._url == b"/v1/load_lora_adapter":
            request = json.loads(self._body)
            self._loras[request["lora_name"]] = request["lora_path"]
            self._respond(b"Success: LoRA adapter added successfully.", "text/plain")
        elif self._url == b"/v1/chat/completions":
            self._chat(json.loads(self._body))
        else:
            raise ValueError(f"vLLM may have {self._url!r}, the mock has not")

    # What vLLM answers

    def _respond(self, body: bytes, content_type: str) -> None:
        head = _head(content_type, f"content-length: {len(body)}")
        self._transport.write(head + body)

    def _json(self, value: Any) -> None:
        self._respond(_dumps(value), "application/json")

    def _chat(self, request: dict[str, Any]) -> None:
        arrived = self._loop.time()
        request_id = f"chatcmpl-{time.time_ns():x}"
        if request.get("stream"):
            include_usage = bool((request.get("stream_options") or {}).get("include_usage"))
            _Stream(self._transport, request_id, request["model"], include_usage).schedule(arrived)
            return
        text = "".join(WORDS[i % len(WORDS)] for i in range(TOKENS))
        message = {
            "role": "assistant", "content": text, "refusal": None, "annotations": None, "audio": None,
            "function_call": None, "reasoning": None,
        }  # fmt: skip
        choice = {
            "index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None,
            "token_ids": None, "routed_experts": None,
        }  # fmt: skip
        body = {
            "id": request_id, "object": "chat.completion", "created": int(time.time()), "model": request["model"],
            "choices": [choice], "service_tier": None, "system_fingerprint": FINGERPRINT,
            "usage": USAGE | {"prompt_tokens_details": None, "completion_tokens_details": None},
            "prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None, "kv_transfer_params": None,
            "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip
        self._loop.call_at(arrived + ANSWER_S, self._json, body)


@dataclass(slots=True)
class _Stream:
    transport: asyncio.Transport
    request_id: str
    model: str
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))
    """The same in all chunks of a stream, as vLLM has it."""

    def schedule(self, arrived: float) -> None:
        """Token k is due at a time of its own, so that a late one delays none of the others."""
        loop = asyncio.get_running_loop()
        for k in range(TOKENS):
            loop.call_at(arrived + FIRST_TOKEN_S + k * BETWEEN_TOKENS_S, self._token, k)

    def _token(self, k: int) -> None:
        if k == 0:
            self.transport.write(_head("text/event-stream; charset=utf-8", "transfer-encoding: chunked"))
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            self._event([first], prompt_token_ids=None, prompt_text=None)
        choice: dict[str, Any] = {"index": 0, "delta": {"content": WORDS[k % len(WORDS)]}, "logprobs": None}
        if k < TOKENS - 1:
            self._event([choice | {"finish_reason": None, "token_ids": None}])
            return
        self._event([choice | {"finish_reason": "length", "stop_reason": None, "token_ids": None}])
        if self.include_usage:
            self._event([], usage=USAGE, system_fingerprint=FINGERPRINT)
        self._chunk(b"data: [DONE]\n\n")
        self.transport.write(b"0\r\n\r\n")

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> None:
        chunk = {"id": self.request_id, "object": "chat.completion.chunk", "created": self.created,
                 "model": self.model, "choices": choices}  # fmt: skip
        self._chunk(b"data: " + _dumps(chunk | more) + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def _head(content_type: str, length: str) -> bytes:
    date = f"date: {formatdate(usegmt=True)}"
    lines = ["HTTP/1.1 200 OK", date, "server: uvicorn", f"content-type: {content_type}", "vary: Origin", length]
    return "\r\n".join([*lines, "", ""]).encode()


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


async def serve(port: int) -> None:
    loras: dict[str, str] = {}
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(loras), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(serve(parser.parse_args().port))

"""`python -m trainer scorer`: says what the newest reward model thinks of answers, over HTTP on a Unix socket in the
state folder. A reward model whose policy was turned away is not asked.

POST / of {"messages", "answers": [...]} answers {"reward_model": id, "scores": [[of each head] of each answer]}; 422 is
for what cannot be scored, 404 while there is no reward model. GET / answers {"reward_model": id or null, "problem": why
the newest one is not taken, or null}.

One request at a time, on one thread, behind everything that people wait for. Torch is loaded with the first reward
model: until then this is a small process that looks at the record now and then."""

import fcntl
import json
import os
import select
import socket
import socketserver
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import learning
from data.database import connect
from data.registry import RegistryError
from data.settings import Settings

if TYPE_CHECKING:
    from trainer.backbone import Backbone
    from trainer.reward_model import RewardModel

LOOK_S = 5.0
"""How often to look for a newer reward model."""
RETRY_S = 60.0
"""How long to leave one alone that could not be loaded."""
NICE = 5
"""Behind the service and its engine, before a training run."""
PATIENCE_S = 5.0
"""For a client to send its request or take the answer."""


class CannotScore(ValueError):
    """Answers that the reward model was not made for; the message says why."""


class Scorer:
    """The newest reward model of the record, once there is one."""

    def __init__(self, settings: Settings) -> None:
        self.reward_model: str | None = None
        self.problem: str | None = None
        """Why the newest is not taken."""
        self._settings = settings
        self._db = connect(settings.database)
        self._tried: str | None = None
        self._retry_at = 0.0
        self._backbone: Backbone | None = None
        self._model: RewardModel | None = None

    def look(self) -> None:
        """Take the newest reward model, where it is another than the last that was tried. One that cannot be loaded
        leaves the one before in its place, and is tried again later. One whose policy was turned away is let go."""
        turned_away = learning.turned_away(self._db)
        if self.reward_model in turned_away:
            print(f"{self.reward_model} scores no more: its policy was turned away", file=sys.stderr, flush=True)
            self.reward_model = self._model = None
        row = next(iter(learning.reward_models(self._db, without=turned_away, limit=1)), None)
        newest = row.id if row else None
        if newest == self._tried and (self.problem is None or time.monotonic() < self._retry_at):
            return
        self._tried = newest
        self.problem = None
        if row is None or newest == self.reward_model:
            return
        try:
            self._load(learning.checked_folder(self._settings.state, row))
        except (RegistryError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: torch, out of memory say
            self.problem = f"{row.id} cannot be loaded: {error}"
            self._retry_at = time.monotonic() + RETRY_S
            print(self.problem, file=sys.stderr, flush=True)
            return
        self.reward_model = row.id
        print(f"{row.id} scores answers now", file=sys.stderr, flush=True)

    def _load(self, folder: Path) -> None:
        # Only now: torch takes seconds to import, and half a gigabyte.
        import torch
        from transformers import AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        from trainer.backbone import Backbone
        from trainer.encoding import ChatFormat
        from trainer.reward_model import RewardModel

        if self._backbone is None:
            disable_progress_bar()
            torch.set_num_threads(1)
            training, name = self._settings.training, self._settings.model
            self._backbone = Backbone.load(name, rank=training.rank, alpha=training.alpha, bf16=training.bf16)
            self._chat = ChatFormat(AutoTokenizer.from_pretrained(name), self._backbone.end_ids)
        # Under another name than the one before, which goes on if this one cannot be read.
        adapter = "reward-b" if self._model is not None and self._model.adapter == "reward-a" else "reward-a"
        model = RewardModel.load(self._backbone, adapter, folder)
        model.rewards([self._chat.answer([{"role": "user", "content": "Hello"}], "Hello.")])  # the first takes long
        self._model = model

    def score(self, messages: list[dict[str, Any]], answers: list[str]) -> list[list[float]]:
        """What each head says of each answer, in standard deviations of the base model's answers. Needs a reward model.
        Raises CannotScore."""
        from trainer.encoding import BadMessages

        model = self._model
        assert model is not None
        try:
            encoded = [self._chat.answer(messages, text) for text in answers]
        except BadMessages as error:
            raise CannotScore(str(error)) from error
        training = self._settings.training
        if len(encoded[0].query) > training.max_prompt_tokens:
            raise CannotScore(f"the prompt is longer than training.max_prompt_tokens ({training.max_prompt_tokens})")
        if max(len(answer.response) for answer in encoded) > training.max_answer_tokens:
            raise CannotScore(f"an answer is longer than training.max_answer_tokens ({training.max_answer_tokens})")
        scores: list[list[float]] = ((model.rewards(encoded) - model.shift) / model.scale).tolist()
        return scores


class Server(socketserver.UnixStreamServer):
    """Answers requests, and looks for a newer reward model between them."""

    request_queue_size = 1024  # who finds the line full is turned away at once, and the default is five

    def __init__(self, scorer: Scorer, address: str) -> None:
        self.scorer = scorer
        self._next_look = 0.0
        Path(address).unlink(missing_ok=True)  # that of a scorer that was killed: the lock is ours
        super().__init__(address, Handler)
        Path(address).chmod(0o600)

    def service_actions(self) -> None:
        if time.monotonic() >= self._next_look:
            self.scorer.look()
            self._next_look = time.monotonic() + LOOK_S


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        scorer = self.server.scorer
        said = {"reward_model": scorer.reward_model, "problem": scorer.problem}
        self._answer(404 if scorer.reward_model is None else 200, said)

    def do_POST(self) -> None:
        scorer = self.server.scorer
        try:  # first, whatever the answer: to a client that still writes, a closed connection is a broken one
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        except (OSError, ValueError):
            return  # the client left, or does not send what it announced
        if scorer.reward_model is None:
            return self._answer(404, {"error": scorer.problem or "there is no reward model yet: train first"})
        try:
            body = json.loads(sent)
            messages, answers = list(body["messages"]), [str(text) for text in body["answers"]]
        except (ValueError, LookupError, TypeError) as error:
            return self._answer(400, {"error": f'send {{"messages": [...], "answers": ["...", ...]}}: {error!r}'})
        if not answers:
            return self._answer(400, {"error": "send at least one answer"})
        if self._nobody_waits():
            return
        try:
            scores = scorer.score(messages, answers)
        except CannotScore as error:
            return self._answer(422, {"error": str(error)})
        self._answer(200, {"reward_model": scorer.reward_model, "scores": scores})

    def _nobody_waits(self) -> bool:
        """Whether the client has left: it waits for a moment only, and may have been behind others in the queue."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        encoded = json.dumps(body).encode()
        with suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what people say does not belong in a log, and the service counts."""


def serve(settings: Settings) -> int:
    """Until told to stop. 1: another scorer serves this state folder."""
    with (settings.state / "scorer.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another scorer already serves {settings.state}.", file=sys.stderr)
            return 1
        address = learning.scorer_address(os.open(settings.state, os.O_PATH | os.O_DIRECTORY))
        with Server(Scorer(settings), address) as server, suppress(KeyboardInterrupt):
            server.serve_forever()
        Path(address).unlink(missing_ok=True)
    return 0

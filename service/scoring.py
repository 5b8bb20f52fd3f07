"""The trainer's scorer, asked over its socket what the newest reward model says of answers.

It may be missing, loading or slow: nothing waits for it longer than `serving.score_timeout_s`."""

import asyncio
import logging
import os
from typing import Any

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from data.learning import scorer_address
from data.settings import Settings
from service.metrics import Metrics

log = logging.getLogger("nightshift.scoring")

LOOK_S = 2.0
"""How often to ask which reward model the scorer holds."""
ANSWER_S = 10.0
"""What it gets to say so: it may be busy with scores."""
NO_SCORES = (aiohttp.ClientError, TimeoutError, OSError, ValidationError)


class _Said(BaseModel):
    model_config = ConfigDict(strict=True)
    reward_model: str


class _Scores(_Said):
    scores: list[list[FiniteFloat]]


class Scorer:
    """One per app."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.reward_model: str | None = None
        """The reward model that scored or was ready to when we last looked; None: no scores are to be had."""
        self._settings = settings
        self._metrics = metrics
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if not self._settings.wants_scores:
            return
        self._folder = os.open(self._settings.state, os.O_PATH | os.O_DIRECTORY)
        self._http = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(scorer_address(self._folder), limit=0, force_close=True),
            json_serialize=lambda value: orjson.dumps(value).decode(),
        )
        self._looking = asyncio.create_task(self._look())

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
            await self._http.close()
            os.close(self._folder)

    async def score(self, messages: list[dict[str, Any]], answers: list[str]) -> list[list[float]] | None:
        """What each head of the reward model says of each of these answers; None where they cannot be had in time."""
        if self.reward_model is None:
            return None
        request = {"messages": messages, "answers": answers}
        try:
            async with asyncio.timeout(self._settings.serving.score_timeout_s):
                async with self._http.post("http://scorer/", json=request) as response:
                    body = await response.read()
            if response.status != 200:
                self._metrics.scorings.labels("refused").inc()
                return None
            said = _Scores.model_validate_json(body)
            heads = {len(of_each_head) for of_each_head in said.scores}
            if len(said.scores) != len(answers) or len(heads) != 1 or heads == {0}:
                raise ValueError(f"not a row of scores, one a head, for each of {len(answers)} answers")
        except TimeoutError:
            self._metrics.scorings.labels("late").inc()
            return None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            log.warning("The scorer failed: %s", error or type(error).__name__)
            self.reward_model = None
            self._metrics.scorings.labels("failed").inc()
            return None
        self.reward_model = said.reward_model
        self._metrics.scorings.labels("scored").inc()
        return said.scores

    async def _look(self) -> None:
        while True:
            before = self.reward_model
            try:
                async with asyncio.timeout(ANSWER_S):
                    async with self._http.get("http://scorer/") as response:
                        body = await response.read()
                self.reward_model = _Said.model_validate_json(body).reward_model if response.status == 200 else None
            except NO_SCORES:
                self.reward_model = None
            if self.reward_model != before:
                log.info("Answers are scored by %s", self.reward_model or "nothing: the scorer has no reward model")
            await asyncio.sleep(LOOK_S)

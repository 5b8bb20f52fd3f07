"""A reward model in the record of a running house, on real vLLM: people are shown what it chooses. The last that uses
the house that others share: from here on it has a reward model."""

import asyncio
import json
import urllib.request
from collections import Counter
from contextlib import closing
from statistics import fmean, stdev

import aiohttp
import torch
from transformers import AutoTokenizer

from data import learning, registry
from data.database import connect, transaction
from data.ids import new_id
from data.settings import STARTER
from data.types import timestamp
from tests.e2e.conftest import House, wait_until
from trainer.backbone import Backbone
from trainer.encoding import ChatFormat
from trainer.reward_model import RewardModel

QUESTION = [{"role": "user", "content": "Can you give me a tip for better sleep?"}]
ASKED = 96


def opinions(heads: int) -> RewardModel:
    """A reward model with opinions, if not with anybody's."""
    backbone = Backbone.load(STARTER, bf16=False)
    model = RewardModel(backbone, "reward", heads=heads)
    torch.manual_seed(0)
    for layer in backbone.adapters.layers.values():
        torch.nn.init.normal_(layer.lora_b["reward"], std=0.05)
    return model


def metric(house: House, name: str) -> float:
    with urllib.request.urlopen(f"{house.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def test_a_reward_model_of_the_record_chooses_what_people_are_shown(house: House) -> None:
    began = timestamp()

    async def ask(count: int, **more: object) -> list[dict[str, object]]:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {house.key}"}) as http:

            async def one() -> dict[str, object]:
                body = {"model": "nightshift", "messages": QUESTION, "max_tokens": 60, "feedback": "off"} | more
                async with http.post(f"{house.url}/v1/chat/completions", json=body) as response:
                    assert response.status == 200, await response.text()
                    answer: dict[str, object] = await response.json()
                    return answer

            return [answer for _ in range(count // 8) for answer in await asyncio.gather(*(one() for _ in range(8)))]

    plain = await ask(ASKED)
    assert metric(house, "nightshift_unseen_answers_total") == 0

    model = opinions(heads=5)
    id = new_id("rm")
    path, sha256 = registry.publish_folder(house.state, id, model.save, parent="reward_models")
    with closing(connect(house.state / "nightshift.db")) as db, transaction(db):
        run = "INSERT INTO runs (id, status, requested_by, config, created_at) VALUES (?, 'succeeded', 'cli', '{}', ?)"
        db.execute(run, ("run_1", timestamp()))
        learning.insert_reward_model(db, learning.RewardModelRow(id, "run_1", path, sha256, {}))
    wait_until(lambda: metric(house, "nightshift_reward_model{"), 180, "the scorer has taken the reward model")
    doctor = json.loads(house.cli("doctor", "--json").stdout)
    assert f"{id} scores answers" in json.dumps(doctor)

    best = await ask(ASKED)
    chat = ChatFormat(AutoTokenizer.from_pretrained(STARTER), model.backbone.end_ids)

    def scores(answers: list[dict[str, object]]) -> list[float]:
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]  # type: ignore[index]
        return model.rewards([chat.answer(QUESTION, text) for text in texts]).mean(dim=1).tolist()  # type: ignore[no-any-return]

    before, after = scores(plain), scores(best)
    # The best of four of a normal distribution is 1.03 standard deviations above its mean; by chance, with as many
    # answers as these, a tenth more or less.
    assert fmean(after) > fmean(before) + 0.4 * stdev(before)
    noted = house.rows("SELECT json_extract(sampling, '$.best_of_n') FROM completions WHERE created_at >= ?", began)
    assert Counter(noted) == {(None,): ASKED, (4,): ASKED}

    await ask(24, feedback="always")
    kinds = dict(house.rows("SELECT kind, count(*) FROM comparisons WHERE created_at >= ? GROUP BY kind", began))
    assert set(kinds) == {"active", "same_policy"}
    assert metric(house, "nightshift_unseen_answers_total") >= 3 * ASKED

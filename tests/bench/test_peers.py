"""The arithmetic of the race, and our half of it at a tiny size. Nothing here looks at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from bench import peers
from bench.peer_trl import resident
from bench.peers import BF16, OURS, PEER, Sizes

TINY = Sizes(pairs=70, repetitions=1, seeds=1, steps=2, held_out=16)


def test_memory_now_is_at_most_the_peak_and_the_peak_stays() -> None:
    block = torch.ones(2**24)
    high = resident("VmRSS")
    del block
    assert high > 2**26
    assert resident("VmHWM") > high - 2**22  # the kernel adds up in batches of pages
    with pytest.raises(ValueError, match="VmNothing"):
        resident("VmNothing")


def reward_run(pairs: int, seconds: float) -> dict[str, Any]:
    return {"pairs": pairs, "seconds": seconds, "before": 10**8, "peak": 3 * 10**8, "accuracy": 0.8}


def ppo_run(episodes: int, seconds: float, *, growth: int, gold: float) -> dict[str, Any]:
    return {
        "episodes": episodes, "tokens": 10 * episodes, "seconds": seconds, "before": 10**8, "peak": 10**8 + growth,
        "gold": gold, "score": [0.0, 0.5], "kl": [0.0, 1.0], "checks": [1.0, -1.0],
    }  # fmt: skip


PAIRS = {
    OURS: [reward_run(100, 2.0), reward_run(100, 4.0), reward_run(100, 1.0)],
    BF16: [reward_run(100, 1.0)] * 3,
    PEER: [reward_run(100, 4.0), reward_run(100, 20.0), reward_run(100, 3.0)],
}
EPISODES = {
    OURS: [ppo_run(60, 3.0, growth=10**9, gold=1.0), ppo_run(60, 6.0, growth=2 * 10**9, gold=2.0)],
    BF16: [ppo_run(60, 2.0, growth=10**9, gold=1.5)] * 2,
    PEER: [ppo_run(60, 12.0, growth=4 * 10**9, gold=0.0), ppo_run(60, 12.0, growth=4 * 10**9, gold=1.0)],
}


def test_ratios_are_medians_of_ratios_within_a_repetition() -> None:
    figures = peers.figures(PAIRS, EPISODES, base=-1.0)
    assert figures == {
        "gold_base": -1.0, "gold_ours": 1.5, "gold_ours_default": 1.5, "gold_trl": 0.5,
        "pairs_ratio": 3.0,  # of 2, 5 and 3
        "pairs_ratio_default": 4.0,  # of 4, 20 and 3
        "episodes_ratio": 3.0,  # of 4 and 2
        "episodes_ratio_default": 6.0,
        "memory_ratio": 0.375,  # of 1/4 and 2/4
    }  # fmt: skip


def test_without_trl_there_are_figures_but_no_ratios() -> None:
    pairs, episodes = ({lane: runs for lane, runs in of.items() if lane != PEER} for of in (PAIRS, EPISODES))
    assert set(peers.figures(pairs, episodes, base=0.0)) == {"gold_base", "gold_ours", "gold_ours_default"}
    assert "TRL |" not in peers.reward_table(pairs).splitlines()[-1]
    assert "| ours " in peers.ppo_table(episodes, base=0.0)


def test_reward_models_that_disagree_are_no_race() -> None:
    theirs = ppo_run(60, 1.0, growth=1, gold=0.0) | {"checks": [1.0, -0.999]}
    peers.check_scores(EPISODES)
    with pytest.raises(RuntimeError, match=r"differ from ours by 1\.0e-03"):
        peers.check_scores({OURS: EPISODES[OURS], PEER: [theirs]})


def test_our_half_runs_and_the_exported_reward_model_says_what_ours_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "THREADS", 1)
    monkeypatch.setattr(peers, "PPO", peers.replace(peers.PPO, rollouts=8, minibatch=4))
    pairs, episodes, base = peers.race(tmp_path, TINY, seed=3, option="off")

    figures = peers.figures(pairs, episodes, base)
    assert set(figures) == {"gold_base", "gold_ours", "gold_ours_default"}
    for (run,) in pairs.values():
        assert run["pairs"] == 32  # two batches, of which the first warms up
        assert 0 <= run["accuracy"] <= 1
        assert run["seconds"] > 0
        assert run["peak"] > run["before"]
    for (run,) in episodes.values():
        assert run["episodes"] == 8
        assert 8 <= run["tokens"] <= 8 * peers.MAX_TOKENS
        assert len(run["score"]) == len(run["kl"]) == 2
        assert run["kl"][0] == pytest.approx(0, abs=1e-4)
        assert (Path(run["out"]) / "policy" / "adapter_model.safetensors").exists()

    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", dtype=torch.float32)
    checks = json.loads((tmp_path / "data.json").read_text())["checks"]
    scores = []
    for query, response in checks:
        with torch.no_grad():
            states = classifier.model(torch.tensor([query + response])).last_hidden_state
            scores.append(float(classifier.score(states)[0, len(query) :].mean()))
    assert scores == pytest.approx(episodes[OURS][0]["checks"], abs=1e-4)
    assert max(scores) - min(scores) > 0.1, "it says the same of every answer"

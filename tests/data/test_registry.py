import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlite_utils import Database

from data import comparisons, learning, registry, runs
from data.database import connect, transaction
from data.registry import RegistryError
from data.settings import Settings
from data.types import BASE_POLICY, Choice, Policy, PolicyStatus, Role, timestamp
from tests.conftest import AddPair, AddPolicy, MakeKey, write_model, write_tensors


def insert(db: Database, name: str, status: str, path: str | None = None) -> None:
    db.execute(
        "INSERT INTO policies (name, path, sha256, base_model, status, created_at) VALUES (?, ?, '', '', ?, ?)",
        (name, path or f"policies/{name}", status, timestamp()),
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "fresh"


# Folders


def test_a_folder_is_published_with_its_digest(state: Path) -> None:
    path, sha256 = registry.publish_folder(state, "policy-0001", lambda folder: _write(folder / "x", b"1"))
    assert path == "policies/policy-0001"
    assert (state / path / "x").read_bytes() == b"1"
    assert registry.folder_digest(state / path) == sha256
    assert [child.name for child in (state / "policies").iterdir()] == ["policy-0001"]


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def test_an_interrupted_publication_leaves_nothing(state: Path) -> None:
    def interrupted(folder: Path) -> None:
        _write(folder / "half", b"1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.publish_folder(state, "policy-0001", interrupted)
    assert list((state / "policies").iterdir()) == []


def test_what_a_killed_publication_left_is_replaced(state: Path) -> None:
    killed = (
        "import os, sys; from pathlib import Path; from data import registry\n"
        "def write(folder):\n    (folder / 'half').write_text('1'); os._exit(9)\n"
        "registry.publish_folder(Path(sys.argv[1]), 'policy-0001', write)"
    )
    process = subprocess.run([sys.executable, "-c", killed, str(state)], env={"PYTHONPATH": ":".join(sys.path)})
    assert process.returncode == 9
    assert not (state / "policies" / "policy-0001").exists()
    path, _ = registry.publish_folder(state, "policy-0001", lambda folder: _write(folder / "whole", b"2"))
    assert [child.name for child in (state / path).iterdir()] == ["whole"]
    assert [child.name for child in (state / "policies").iterdir()] == ["policy-0001"]


def test_a_folder_published_without_its_row_is_replaced(state: Path) -> None:
    registry.publish_folder(state, "policy-0001", lambda folder: _write(folder / "old", b"1"))
    path, _ = registry.publish_folder(state, "policy-0001", lambda folder: _write(folder / "new", b"2"))
    assert [child.name for child in (state / path).iterdir()] == ["new"]


def test_files_and_folders_are_synced_before_the_name_is_taken(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()).removeprefix(str(state.resolve())))
        real(handle)

    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        _write(folder / "sub" / "x", b"1")

    monkeypatch.setattr(os, "fsync", fsync)
    registry.publish_folder(state, "policy-0001", write)
    building = "/policies/.policy-0001.building"
    assert set(synced[:-1]) == {building, f"{building}/sub", f"{building}/sub/x"}
    assert synced[-1] == "/policies"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _write(folder / "x", b"2"),
        lambda folder: _write(folder / "x", b""),
        lambda folder: _write(folder / "more", b""),
        lambda folder: (folder / "x").unlink(),
        lambda folder: (folder / "x").rename(folder / "y"),
    ],
)
def test_a_digest_tells_every_change(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    _write(folder / "x", b"1")
    before = registry.folder_digest(folder)
    _write(folder / "x", b"1")
    assert registry.folder_digest(folder) == before
    change(folder)
    assert registry.folder_digest(folder) != before


def test_a_digest_knows_where_one_file_ends_and_the_next_begins(tmp_path: Path) -> None:
    for name, files in {"one": {"a": b"bc"}, "two": {"ab": b"c"}, "three": {"a": b"", "bc": b""}}.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            _write(tmp_path / name / file, content)
    assert len({registry.folder_digest(tmp_path / name) for name in ("one", "two", "three")}) == 3


# What may be loaded


def base(db: Database) -> Policy:
    (policy,) = registry.list_policies(db)
    return policy


def test_a_checked_folder_is_absolute_and_what_was_published(db: Database, settings: Settings) -> None:
    folder = registry.checked_folder(settings.state, base(db))
    assert folder.is_absolute()
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_changed_or_missing_folder_is_refused_with_what_to_do(db: Database, settings: Settings) -> None:
    policy = base(db)
    _write(settings.state / policy.path / "more", b"")
    with pytest.raises(RegistryError, match=r"sha256 differs.*Restore"):
        registry.checked_folder(settings.state, policy)
    shutil.rmtree(settings.state / policy.path)
    with pytest.raises(RegistryError, match="files are missing"):
        registry.checked_folder(settings.state, policy)


@pytest.mark.parametrize("path", ["../model", "policies/../../model", "/etc", "nightshift.db", "."])
def test_a_folder_outside_the_policies_is_refused(settings: Settings, path: str) -> None:
    policy = Policy("policy-0001", None, path, "", "", PolicyStatus.PROMOTED, timestamp())
    with pytest.raises(RegistryError, match="outside"):
        registry.checked_folder(settings.state, policy)


def test_a_link_that_leads_outside_is_refused(db: Database, settings: Settings, tmp_path: Path) -> None:
    policy = base(db)
    folder = settings.state / policy.path
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="outside"):
        registry.checked_folder(settings.state, policy)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: _write(folder / "adapter_model.bin", b"x"), "nothing else"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "nothing else"),
        (lambda folder: _write(folder / "adapter_config.json", b'{"peft_type": "LORA", "r": 17}'), "rank 17"),
        (lambda folder: _write(folder / "adapter_config.json", b'{"peft_type": "IA3", "r": 1}'), "IA3"),
        (lambda folder: _write(folder / "adapter_config.json", b"no JSON"), "no rank"),
    ],
)
def test_a_folder_that_vllm_must_not_see_is_refused(
    db: Database, settings: Settings, add_policy: AddPolicy, change: Callable[[Path], object], why: str
) -> None:
    policy = registry.get(db, add_policy(change=change))
    assert registry.checked_folder(settings.state, policy), "it is what was published"
    with pytest.raises(RegistryError, match=why):
        registry.servable_folder(db, settings.state, policy, max_rank=16)


def test_a_folder_of_the_running_model_is_served(db: Database, settings: Settings, add_policy: AddPolicy) -> None:
    policy = registry.get(db, add_policy())
    folder = registry.servable_folder(db, settings.state, policy, max_rank=1)
    assert folder == registry.checked_folder(settings.state, policy)
    with pytest.raises(RegistryError, match="another base model"):
        registry.servable_folder(db, settings.state, replace(policy, base_model="0" * 64), max_rank=1)


# Where a policy comes from


def test_a_lineage_leads_from_the_policy_to_the_exact_votes_and_their_comparisons(
    db: Database, add_policy: AddPolicy, add_pair: AddPair, make_key: MakeKey
) -> None:
    voter = make_key()[0].id
    pairs = [add_pair(voter, policies=(BASE_POLICY, BASE_POLICY)) for _ in range(3)]
    ids = []
    with transaction(db):
        for pair, choice in zip(pairs, (Choice.A, Choice.TIE, Choice.B), strict=True):
            cast = comparisons.vote(db, pair, key_id=voter, role=Role.USER, choice=choice, comment=None, window_s=600.0)
            ids.append(cast.vote.id)
        run = runs.request(db, requested_by="cli", config={})
        learning.record_votes(db, run.id, [(ids[0], "a", "train", 1.0), (ids[2], "b", "held_out", 0.5)])
        row = learning.RewardModelRow("rm_1", run.id, "reward_models/rm_1", "", {"accuracy": 0.8})
        learning.insert_reward_model(db, row)
        # It was changed after the run had learned from it.
        comparisons.vote(db, pairs[0], key_id=voter, role=Role.USER, choice=Choice.B, comment=None, window_s=600.0)
    name = add_policy(run_id=run.id, reward_model="rm_1")
    lineage = registry.lineage(db, name)
    assert (lineage["policy"], lineage["parent"]) == (name, BASE_POLICY)
    assert (lineage["run"]["id"], lineage["run"]["requested_by"]) == (run.id, "cli")
    assert lineage["reward_model"] == {"id": "rm_1", "report": {"accuracy": 0.8}}
    assert {(v["vote"], v["choice"], v["split"], v["weight"], v["comparison"]) for v in lineage["votes"]} == {
        (ids[0], "a", "train", 1.0, pairs[0]), (ids[2], "b", "held_out", 0.5, pairs[2]),
    }  # fmt: skip
    assert {(v["voter"], v["policy_a"], v["policy_b"]) for v in lineage["votes"]} == {(voter, BASE_POLICY, BASE_POLICY)}


def test_a_policy_without_a_run_has_a_short_lineage(db: Database) -> None:
    assert registry.lineage(db, BASE_POLICY) == {
        "policy": BASE_POLICY, "parent": None, "run": None, "reward_model": None, "votes": [],
    }  # fmt: skip
    with pytest.raises(registry.UnknownPolicy):
        registry.lineage(db, "policy-0009")


# Rows


def test_before_the_first_start_the_promoted_policy_is_to_serve(db: Database) -> None:
    policy = registry.serving(db)
    assert policy is not None
    assert (policy.name, policy.status) == ("policy-0000", PolicyStatus.PROMOTED)


def test_the_serving_policy_goes_before_a_promoted_one(db: Database) -> None:
    registry.set_serving(db, "policy-0000")
    insert(db, "policy-0001", "promoted")
    policy = registry.serving(db)
    assert policy is not None
    assert policy.name == "policy-0000"


def test_when_another_policy_serves_the_old_one_retires(db: Database) -> None:
    registry.set_serving(db, "policy-0000")
    insert(db, "policy-0001", "promoted")
    with transaction(db):
        registry.set_serving(db, "policy-0001")
    statuses = {policy.name: policy.status for policy in registry.list_policies(db)}
    assert statuses == {"policy-0000": PolicyStatus.RETIRED, "policy-0001": PolicyStatus.SERVING}
    with transaction(db):
        assert registry.set_serving(db, "policy-0000", back=True) == "policy-0001"
    statuses = {policy.name: policy.status for policy in registry.list_policies(db)}
    assert statuses == {"policy-0000": PolicyStatus.SERVING, "policy-0001": PolicyStatus.ROLLED_BACK}


def test_a_record_without_policies_has_none_to_serve(tmp_path: Path) -> None:
    db = connect(tmp_path / "empty.db")
    assert registry.serving(db) is None
    assert registry.list_policies(db) == []
    db.close()


# policy-0000


def test_the_base_policy_is_made_once(db: Database, settings: Settings, model: Path) -> None:
    before = base(db)
    assert before.name == "policy-0000"
    assert before.parent is None
    assert registry.ensure_base_policy(db, settings.state, model) == before


def test_the_base_policy_changes_nothing_of_the_model(db: Database, settings: Settings) -> None:
    from safetensors.numpy import load_file

    folder = settings.state / base(db).path
    tensors = load_file(folder / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{layer}.lora_A.weight": (1, 4),
        f"{layer}.lora_B.weight": (6, 1),
    }
    assert not tensors[f"{layer}.lora_B.weight"].any()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (1, 1, "none")
    assert config["target_modules"] == ["q_proj"]
    assert "modules_to_save" not in config


def test_a_state_folder_of_another_model_is_refused_with_what_to_do(
    db: Database, settings: Settings, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other")
    (other / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(RegistryError, match=r"another base model.*--state.*--model"):
        registry.ensure_base_policy(db, settings.state, other)


def test_models_are_told_apart_by_their_config_and_their_tensors(tmp_path: Path, model: Path) -> None:
    first = registry.model_fingerprint(model)
    same = shutil.copytree(model, tmp_path / "same")
    assert registry.model_fingerprint(same) == first
    write_tensors(same / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": [4, 6]})
    assert registry.model_fingerprint(same) != first


def test_a_model_in_several_files_has_its_adapter_too(tmp_path: Path, state: Path) -> None:
    model = tmp_path / "sharded"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_tensors(model / "model-00001-of-00002.safetensors", {"model.embed_tokens.weight": [8, 4]})
    write_tensors(model / "model-00002-of-00002.safetensors", {"model.layers.3.self_attn.qkv_proj.weight": [12, 4]})
    db = connect(state / "nightshift.db")
    policy = registry.ensure_base_policy(db, state, model)
    db.close()
    config = json.loads((state / policy.path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["qkv_proj"]


def test_a_model_without_attention_is_refused_and_leaves_nothing(tmp_path: Path, state: Path) -> None:
    model = tmp_path / "odd"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_tensors(model / "model.safetensors", {"conv.weight": [4, 4]})
    db = connect(state / "nightshift.db")
    with pytest.raises(RegistryError, match="No attention projection"):
        registry.ensure_base_policy(db, state, model)
    assert registry.list_policies(db) == []
    db.close()
    assert list((state / "policies").iterdir()) == []

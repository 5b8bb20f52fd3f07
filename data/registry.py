"""The policies: folders that are written whole or not at all, and the rows that name them."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from data.database import transaction
from data.types import BASE_POLICY, Policy, PolicyStatus, timestamp

_COLUMNS = "name, parent, path, sha256, base_model, status, created_at, run_id, reward_model, metrics, problem"


class RegistryError(RuntimeError):
    """A policy that cannot be used; the message says why and what to do."""


class UnknownPolicy(LookupError):
    """No policy of that name."""


def _policy(row: tuple[str, ...]) -> Policy:
    name, parent, path, sha256, base_model, status, created_at, run_id, reward_model, metrics, problem = row
    return Policy(
        name,
        parent,
        path,
        sha256,
        base_model,
        PolicyStatus(status),
        created_at,
        run_id,
        reward_model,
        json.loads(metrics),
        problem,
    )


def list_policies(db: Database) -> list[Policy]:
    return [_policy(row) for row in db.execute(f"SELECT {_COLUMNS} FROM policies ORDER BY name")]


def get(db: Database, name: str) -> Policy:
    """Raises UnknownPolicy."""
    row = db.execute(f"SELECT {_COLUMNS} FROM policies WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise UnknownPolicy(name)
    return _policy(row)


def serving(db: Database) -> Policy | None:
    """The one policy that serves; before the first start, the first promoted one, which is to."""
    row = db.execute(
        f"SELECT {_COLUMNS} FROM policies WHERE status IN ('serving', 'promoted')"
        " ORDER BY status = 'serving' DESC, name LIMIT 1"
    ).fetchone()
    return _policy(row) if row else None


def set_serving(db: Database, name: str, *, back: bool = False) -> str | None:
    """Call inside a transaction, after every engine has confirmed `name`. Returns the policy that served before, which
    is now retired, or rolled back where `name` is what served before that."""
    row = db.execute("SELECT name FROM policies WHERE status = 'serving' AND name <> ?", (name,)).fetchone()
    if row is not None:
        status = PolicyStatus.ROLLED_BACK if back else PolicyStatus.RETIRED
        set_status(db, row[0], status)
    set_status(db, name, PolicyStatus.SERVING)
    return row[0] if row else None


def set_status(db: Database, name: str, status: PolicyStatus, *, problem: str | None = None) -> None:
    """Call inside a transaction."""
    db.execute("UPDATE policies SET status = ?, problem = ? WHERE name = ?", (status, problem, name))


def note_problem(db: Database, name: str, problem: str | None) -> None:
    """Say what keeps a policy from going further; None, or its next status, takes it away again. Call inside a
    transaction."""
    db.execute("UPDATE policies SET problem = ? WHERE name = ?", (problem, name))


def next_for_trial(db: Database) -> Policy | None:
    """The latest candidate that passed the gate."""
    row = db.execute(
        f"SELECT {_COLUMNS} FROM policies WHERE status = 'candidate' AND json_extract(metrics, '$.gate.passed')"
        " ORDER BY name DESC LIMIT 1"
    ).fetchone()
    return _policy(row) if row else None


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files in `folder`, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix().encode()
        digest.update(struct.pack("<QQ", len(name), path.stat().st_size) + name)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def checked_folder(state: Path, policy: Policy) -> Path:
    """The absolute folder of `policy`, its contents proved to be what was published. Raises RegistryError."""
    root = (state / "policies").resolve()
    folder = (state / policy.path).resolve()
    if not folder.is_relative_to(root):
        raise RegistryError(f"{policy.name} lies at {policy.path}, outside {root}: it will not be loaded.")
    if not folder.is_dir() or folder_digest(folder) != policy.sha256:
        raise RegistryError(
            f"{folder} is not what was published as {policy.name} (its sha256 differs or files are missing)."
            " Restore the folder from a backup, or roll back to another policy."
        )
    return folder


ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
"""All that a served folder holds. vLLM would also load a pickle, which runs whatever code is in it."""


def servable_folder(db: Database, state: Path, policy: Policy, *, max_rank: int) -> Path:
    """`checked_folder`, and proof that it is an adapter that vLLM can load onto the model that runs: made for that
    model, LoRA, of rank `max_rank` at most, and without pickles. Raises RegistryError."""
    folder = checked_folder(state, policy)
    if policy.base_model != get(db, BASE_POLICY).base_model:
        raise RegistryError(f"{policy.name} was trained on another base model than the one that runs: it does not fit.")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    if files != ADAPTER_FILES:
        raise RegistryError(
            f"{folder} must hold {' and '.join(ADAPTER_FILES)} and nothing else, and has"
            f" {', '.join(files) or 'no file'}: {policy.name} will not be loaded."
        )
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        kind, rank = config["peft_type"], int(config["r"])
    except (ValueError, LookupError, TypeError):
        raise RegistryError(f"{folder / 'adapter_config.json'} is no adapter's: {policy.name} has no rank.") from None
    if kind != "LORA":
        raise RegistryError(f"{policy.name} is an adapter of the kind {kind}, and only LORA is served.")
    if rank > max_rank:
        raise RegistryError(
            f"{policy.name} has rank {rank}, and the engine takes {max_rank}: raise engine.max_lora_rank and restart."
        )
    return folder


def publish_folder(
    state: Path,
    name: str,
    write: Callable[[Path], None],
    *,
    parent: str = "policies",
    placing: AbstractContextManager[object] | None = None,
) -> tuple[str, str]:
    """Let `write(folder)` fill a folder, and put it in place as `parent`/`name`, whole or not at all.

    Returns its path relative to `state` and its sha256. What an earlier, interrupted publication of the same name left
    behind is replaced: a name counts as taken only once its row exists. `placing` is held while the folder takes its
    place; what it raises when it is entered leaves whatever lies there as it is."""
    home = state / parent
    home.mkdir(parents=True, exist_ok=True)
    building, final = home / f".{name}.building", home / name
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        write(building)
        for path in [*building.rglob("*"), building]:
            _fsync(path)
        sha256 = folder_digest(building)
        with placing or nullcontext():
            shutil.rmtree(final, ignore_errors=True)
            building.rename(final)
            _fsync(home)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return final.relative_to(state).as_posix(), sha256


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def ensure_base_policy(db: Database, state: Path, model: Path) -> Policy:
    """policy-0000 for the base model in `model`, made now if there is none. Raises RegistryError where the state
    folder belongs to another model."""
    fingerprint = model_fingerprint(model)
    row = db.execute(f"SELECT {_COLUMNS} FROM policies WHERE name = ?", (BASE_POLICY,)).fetchone()
    if row is not None:
        policy = _policy(row)
        if policy.base_model != fingerprint:
            raise RegistryError(
                f"{state} was made for another base model: its votes and policies do not fit {model}."
                " Start with another state folder (--state), or with the model it was made for (--model)."
            )
        return policy
    path, sha256 = publish_folder(state, BASE_POLICY, lambda folder: write_identity_adapter(model, folder))
    policy = Policy(BASE_POLICY, None, path, sha256, fingerprint, PolicyStatus.PROMOTED, timestamp())
    with transaction(db):
        insert(db, policy)
    return policy


def insert(db: Database, policy: Policy) -> None:
    """Make a published folder known. Call inside a transaction, after `publish_folder`."""
    p = policy
    db.execute(
        f"INSERT INTO policies ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            p.name,
            p.parent,
            p.path,
            p.sha256,
            p.base_model,
            p.status,
            p.created_at,
            p.run_id,
            p.reward_model,
            json.dumps(p.metrics),
            p.problem,
        ),
    )


def lineage(db: Database, name: str) -> dict[str, Any]:
    """Where a policy comes from: {"policy", "parent", "run", "reward_model", "votes"}, each vote with what it was when
    the run learned from it, its comparison, and who wrote the two answers. Raises UnknownPolicy."""
    rows = list(
        db.query(
            "SELECT policies.name, policies.parent, runs.id AS run, runs.requested_by, runs.ended_at,"
            " reward_models.id AS reward_model, reward_models.metrics AS reward_metrics, run_votes.vote_id AS vote,"
            " run_votes.choice, split, weight, votes.key_id AS voter, comparison_id AS comparison, kind,"
            " duel_id AS duel, first.policy AS policy_a, second.policy AS policy_b, comparisons.created_at AS shown_at"
            " FROM policies"
            " LEFT JOIN runs ON runs.id = policies.run_id"
            " LEFT JOIN reward_models ON reward_models.id = policies.reward_model"
            " LEFT JOIN run_votes ON run_votes.run_id = runs.id LEFT JOIN votes ON votes.id = vote_id"
            " LEFT JOIN comparisons ON comparisons.id = comparison_id"
            " LEFT JOIN completions AS first ON first.id = a LEFT JOIN completions AS second ON second.id = b"
            " WHERE policies.name = ? ORDER BY vote_id",
            (name,),
        )
    )
    if not rows:
        raise UnknownPolicy(name)
    of = rows[0]
    of_vote = ["vote", "choice", "split", "weight", "voter", "comparison", "kind", "duel", "policy_a", "policy_b"]
    return {
        "policy": of["name"],
        "parent": of["parent"],
        "run": of["run"] and {name: of[name] for name in ("requested_by", "ended_at")} | {"id": of["run"]},
        "reward_model": of["reward_model"] and {"id": of["reward_model"], "report": json.loads(of["reward_metrics"])},
        "votes": [{name: row[name] for name in (*of_vote, "shown_at")} for row in rows if row["vote"] is not None],
    }


def next_name(db: Database) -> str:
    """The name of the policy after the last; none is ever used again."""
    last = db.execute("SELECT max(name) FROM policies").fetchone()[0]
    return f"policy-{int(last.rpartition('-')[2]) + 1:04d}"


def model_fingerprint(model: Path) -> str:
    """SHA-256 of config.json and of the header of every weights file: tells models apart without reading gigabytes."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for weights in sorted(model.glob("*.safetensors")):
        digest.update(json.dumps(_safetensors_header(weights), sort_keys=True).encode())
        digest.update(str(weights.stat().st_size).encode())
    return digest.hexdigest()


def check_weights(model: Path) -> None:
    """Raises RegistryError where a weights file is not whole."""
    for weights in sorted(model.glob("*.safetensors")):
        _safetensors_header(weights)


def _safetensors_header(weights: Path) -> dict[str, dict[str, Any]]:
    """Raises RegistryError where the file is not whole."""
    size = weights.stat().st_size
    with weights.open("rb") as file:
        if (first := file.read(8)) == b"version ":
            raise RegistryError(f"{weights} is Git LFS's pointer to the weights: fetch them with `git lfs pull`.")
        length = int.from_bytes(first, "little")
        try:
            if len(first) < 8 or 8 + length > size:
                raise ValueError("no whole header")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) > size:
                raise ValueError("tensors are missing")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise RegistryError(f"{weights} is not whole ({size} bytes of it are here): copy it again.") from None
    return header


ATTENTION_PROJECTIONS = ("q_proj", "qkv_proj", "query_key_value", "c_attn")
"""Names that the families of decoders give their first linear layer."""


def write_identity_adapter(model: Path, folder: Path) -> None:
    """A LoRA adapter (PEFT's format) whose B is zero, on one layer: the base model, unchanged.

    Every request must name an adapter, since vLLM on a CPU lets base requests in a mixed batch pick one up. Written
    from the header of the weights alone, without torch. Raises RegistryError where `model` has no layer to put it
    on."""
    for weights in sorted(model.glob("*.safetensors")):
        for name, tensor in sorted(_safetensors_header(weights).items()):
            layer, _, leaf = name.rpartition(".")
            projection = layer.rpartition(".")[2]
            if leaf == "weight" and projection in ATTENTION_PROJECTIONS:
                shape = tensor["shape"]
                assert isinstance(shape, list)
                n_out, n_in = shape
                _write_adapter(folder, layer, projection, n_in=n_in, n_out=n_out)
                return
    raise RegistryError(
        f"No attention projection ({', '.join(ATTENTION_PROJECTIONS)}) in the safetensors files of {model}:"
        " is it a decoder model, saved by save_pretrained?"
    )


def _write_adapter(folder: Path, layer: str, projection: str, *, n_in: int, n_out: int) -> None:
    rank = 1
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [projection],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    prefix = f"base_model.model.{layer}"
    a_bytes, b_bytes = 4 * rank * n_in, 4 * n_out * rank
    header = {
        f"{prefix}.lora_A.weight": {"dtype": "F32", "shape": [rank, n_in], "data_offsets": [0, a_bytes]},
        f"{prefix}.lora_B.weight": {
            "dtype": "F32",
            "shape": [n_out, rank],
            "data_offsets": [a_bytes, a_bytes + b_bytes],
        },
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(encoded)) + encoded + bytes(a_bytes + b_bytes)
    )

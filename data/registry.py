"""The policies: folders that are written whole or not at all, and the rows that name them."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from sqlite_utils import Database

from data.database import transaction
from data.types import BASE_POLICY, Policy, PolicyStatus, timestamp

_COLUMNS = "name, parent, path, sha256, base_model, status, created_at, run_id, reward_model, metrics"


class RegistryError(RuntimeError):
    """A policy that cannot be used; the message says why and what to do."""


def _policy(row: tuple[str, ...]) -> Policy:
    name, parent, path, sha256, base_model, status, created_at, run_id, reward_model, metrics = row
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
    )


def list_policies(db: Database) -> list[Policy]:
    return [_policy(row) for row in db.execute(f"SELECT {_COLUMNS} FROM policies ORDER BY name")]


def serving(db: Database) -> Policy | None:
    """The one policy that serves; before the first start, the promoted one that is to."""
    row = db.execute(
        f"SELECT {_COLUMNS} FROM policies WHERE status IN ('serving', 'promoted')"
        " ORDER BY status = 'serving' DESC, name DESC LIMIT 1"
    ).fetchone()
    return _policy(row) if row else None


def set_serving(db: Database, name: str) -> None:
    """Call inside a transaction, after every engine has confirmed `name`."""
    db.execute("UPDATE policies SET status = 'retired' WHERE status = 'serving' AND name <> ?", (name,))
    db.execute("UPDATE policies SET status = 'serving' WHERE name = ?", (name,))


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


def publish_folder(
    state: Path, name: str, write: Callable[[Path], None], *, parent: str = "policies"
) -> tuple[str, str]:
    """Let `write(folder)` fill a folder, and put it in place as `parent`/`name`, whole or not at all.

    Returns its path relative to `state` and its sha256. What an earlier, interrupted publication of the same name left
    behind is replaced: a name counts as taken only once its row exists."""
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
        f"INSERT INTO policies ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
        ),
    )


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


def _safetensors_header(weights: Path) -> dict[str, dict[str, object]]:
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, object]] = json.loads(file.read(length))
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

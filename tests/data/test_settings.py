from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

import pytest
from pydantic import BaseModel, TypeAdapter

from data.settings import (
    STARTER,
    BadSettings,
    PPOFields,
    RewardFields,
    ServerSettings,
    Settings,
    load_settings,
)
from trainer.ppo import PPOConfig
from trainer.reward_model import RewardConfig

pytestmark = pytest.mark.usefixtures("plain_environment")


def test_without_anything_given_the_defaults_hold() -> None:
    settings = load_settings()
    assert settings.state == Path("var")
    assert settings.database == Path("var/nightshift.db")
    assert settings.model == str(STARTER)
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8000)
    assert settings.engine.urls == []
    assert settings.chat.max_n == 2


def test_the_file_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nightshift.toml").write_text(
        'state = "there"\n[server]\nport = 9000\nhost = "0.0.0.0"\n[comparisons]\nrate = 0.5\n'
    )
    monkeypatch.setenv("NIGHTSHIFT_SERVER__PORT", "9001")
    monkeypatch.setenv("NIGHTSHIFT_ENGINE__URLS", '["http://one:1", "http://two:2"]')
    settings = load_settings()
    assert (settings.server.host, settings.server.port) == ("0.0.0.0", 9001)
    assert settings.state == Path("there")
    assert settings.comparisons.rate == 0.5
    assert settings.engine.urls == ["http://one:1", "http://two:2"]


def test_a_whole_number_in_the_environment_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_TRAINING__PPO__STEPS", "12")
    monkeypatch.setenv("NIGHTSHIFT_TRAINING__PPO__BETA", "0.5")
    assert str(load_settings().training.ppo) == "{'steps': 12, 'beta': 0.5}"


@pytest.mark.parametrize(("fields", "config"), [(RewardFields, RewardConfig), (PPOFields, PPOConfig)])
def test_a_run_s_settings_are_its_configs_fields_and_take_their_defaults(fields: type, config: type) -> None:
    defaults = asdict(config())
    assert list(get_type_hints(fields)) == list(defaults)
    assert TypeAdapter(fields).validate_python(defaults, strict=True) == defaults


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_STATE", "from-environment")
    assert load_settings().state == Path("from-environment")
    assert load_settings(state=Path("given")).state == Path("given")


def test_what_is_empty_in_the_environment_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE", "MODEL", "CONFIG", "SERVER__PORT", "ENGINE__URLS", "TRAINING__PPO"):
        monkeypatch.setenv(f"NIGHTSHIFT_{name}", "")
    assert load_settings() == Settings()


def test_another_file_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.toml").write_text("[server]\nport = 9100\n")
    monkeypatch.setenv("NIGHTSHIFT_CONFIG", str(tmp_path / "other.toml"))
    assert load_settings().server.port == 9100


def test_a_file_that_is_named_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_CONFIG", "nowhere.toml")
    with pytest.raises(BadSettings, match=r"NIGHTSHIFT_CONFIG names nowhere\.toml"):
        load_settings()


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("[server]\nport = 70000", r"server\.port"),
        ('[server]\nport = "many"', r"server\.port"),
        ("[server]\nprot = 1", r"server\.prot"),
        ("[comparisons]\nrate = 1.5", r"comparisons\.rate"),
        ("[comparisons]\nexpires_after_s = 0", r"comparisons\.expires_after_s"),
        ("[chat]\nmax_tokens = 0", r"chat\.max_tokens"),
        ("[engine]\nmax_adapters = 2", r"engine\.max_adapters"),
        ("[engine]\nurls = 'http://one'", r"engine\.urls"),
        ("[training.ppo]\nsteps = 2.5", r"training\.ppo\.steps"),
        ("[training.ppo]\nbeta = nan", r"training\.ppo\.beta"),
        ("[training.ppo]\nstpes = 2", r"there is no training\.ppo\.stpes"),
        ("[training.reward]\ncentring = -1", r"training\.reward\.centring"),
        ("[training]\nrank = 64", r"^Bad setting: training\.rank is 64, and .* engine\.max_lora_rank = 16: raise that"),
        ("statt = 'x'", "there is no statt"),
        ("[sever]\nport = 1", "sever"),
        ("this is not toml", r"nightshift\.toml cannot be read"),
    ],
)
def test_a_bad_value_in_the_file_is_named(tmp_path: Path, toml: str, named: str) -> None:
    (tmp_path / "nightshift.toml").write_text(toml)
    with pytest.raises(BadSettings, match=named):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("NIGHTSHIFT_SERVER__PORT", "x", r"server\.port"),
        ("NIGHTSHIFT_SERVER__PROT", "1", r"server\.prot"),
        ("NIGHTSHIFT_COMPARISONS__RATE", "-1", r"comparisons\.rate"),
        ("NIGHTSHIFT_ENGINE__URLS", "http://one", "^NIGHTSHIFT_ENGINE__URLS in the environment must be JSON"),
        ("NIGHTSHIFT_SERVER", "not json", "^NIGHTSHIFT_SERVER in the environment must be JSON, and not json is not"),
        ("NIGHTSHIFT_TRAINING__PPO", "steps=3", "^NIGHTSHIFT_TRAINING__PPO in the environment must be JSON"),
        ("NIGHTSHIFT_TRAINING__PPO", '{"stpes": 3}', r"there is no training\.ppo\.stpes"),
        ("NIGHTSHIFT_TRAINING__PPO__STEPS", "0", r"training\.ppo\.steps"),
        ("NIGHTSHIFT_TRAINING__REWARD__HEADS", "many", r"training\.reward\.heads"),
    ],
)
def test_a_bad_value_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings, match=named):
        load_settings()


def test_what_the_command_takes_from_the_environment_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_URL", "http://somewhere")
    monkeypatch.setenv("NIGHTSHIFT_API_KEY", "ns-x-y")
    load_settings()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("10.0.0.5", "http://10.0.0.5:8000"),
        ("chat.example.org", "http://chat.example.org:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("fd00::5", "http://[fd00::5]:8000"),
    ],
)
def test_the_url_is_one_that_can_be_asked_whatever_is_listened_on(host: str, url: str) -> None:
    assert ServerSettings(host=host).url == url


def _undescribed(model: type[BaseModel], path: str = "") -> list[str]:
    missing = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            missing += _undescribed(field.annotation, f"{path}{name}.")
        elif not field.description:
            missing.append(path + name)
    return missing


def test_every_setting_is_described() -> None:
    assert _undescribed(Settings) == []

"""Every setting, its default and its unit. Read from nightshift.toml in the working folder (or the file that
NIGHTSHIFT_CONFIG names) and from the environment, where NIGHTSHIFT_SERVER__PORT=9000 sets `server.port`; the
environment wins, and what is empty in it is not set."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

STARTER = Path(__file__).parent / "starter"
"""The chat model that the project ships."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ServerSettings(_Section):
    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: int = Field(8000, ge=1, le=65535)
    """Port the API listens on."""
    max_body_bytes: int = Field(1_048_576, ge=1024)
    """Largest request body, bytes."""
    shutdown_timeout_s: int = Field(10, ge=0)
    """Seconds that running answers get to finish when the service stops."""
    session_s: float = Field(30 * 86_400.0, gt=0)
    """Seconds after which a browser must sign in again."""

    @property
    def url(self) -> str:
        """Where this machine reaches the API: listening on every address, it is on the loopback one too."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


class EngineSettings(_Section):
    urls: list[str] = []
    """vLLM servers to use, e.g. ["http://10.0.0.5:8000"]. Empty: `nightshift up` starts one itself."""
    api_key: str = ""
    """Key of those vLLM servers. The server that `nightshift up` starts gets a fresh one each time."""
    port: int = Field(0, ge=0, le=65535)
    """Loopback port of the vLLM server that `nightshift up` starts; 0 takes a free one."""
    dtype: str = ""
    """vLLM's --dtype; empty: float32 on a CPU, auto on a GPU."""
    max_lora_rank: int = Field(16, ge=1)
    """Adapters are padded to it, so keep it as small as the adapters allow."""
    max_adapters: int = Field(3, ge=3)
    """Adapters that can be in one batch: serving, candidate and draining."""
    max_queued: int = Field(1024, ge=1)
    """Requests that may run or wait in vLLM, the unseen draws of best of n and of active pairs and training's own
    among them; more are answered 503."""
    cpu_kv_cache_gib: int = Field(1, ge=1)
    """Memory for the KV cache on a CPU, GiB."""
    gpu_memory_share: float = Field(0.5, gt=0, lt=1)
    """Part of a GPU's memory that vLLM takes for itself; training on the same GPU lives on the rest."""
    arguments: list[str] = []
    """More arguments for the vLLM server, e.g. ["--tool-call-parser", "hermes", "--enable-auto-tool-choice"]."""
    poll_s: float = Field(1.0, gt=0)
    """Seconds between looks at an engine's health."""


class ChatSettings(_Section):
    model_name: str = "nightshift"
    """What clients call the model."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer, tokens."""
    max_n: int = Field(2, ge=1)
    """Most choices in one response."""
    max_messages: int = Field(100, ge=1)
    """Most messages in one request."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest that one answer may take, seconds."""


class ComparisonSettings(_Section):
    rate: float = Field(0.1, ge=0, le=1)
    """Chance that an `auto` request is answered with two answers."""
    daily_cap: int = Field(20, ge=0)
    """Most comparisons that `auto` shows one user in 24 hours."""
    cooldown_turns: int = Field(3, ge=0)
    """Plain answers between two comparisons that `auto` shows one user."""
    expires_after_s: float = Field(86_400.0, gt=0)
    """Seconds in which a comparison can be voted on."""
    vote_window_s: float = Field(600.0, ge=0)
    """Seconds in which a vote can be changed."""
    rater_lease_s: float = Field(1_800.0, gt=0)
    """Seconds that a rater keeps a pair of the queue to themselves."""
    gold_rate: float = Field(0.05, ge=0, le=1)
    """Chance that a rater is first asked about a trusted pair, unknowingly, when a new pair is due."""
    active_share: float = Field(0.5, ge=0, le=0.8)
    """Share of the pairs, duels left out, for which more answers are drawn and the second one shown is that on which
    the reward model's heads disagree most with the first; 0: never. What is left are random pairs, which measure
    without bias, so some always are."""
    active_draws: int = Field(4, ge=3, le=16)
    """Answers drawn for such a pair, the two that are shown among them."""


class ServingSettings(_Section):
    best_of_n: int = Field(1, ge=1, le=16)
    """Answers drawn for a plain request, of which the one that the reward model likes best is given; 1: off. It streams
    once it is chosen."""
    score_timeout_s: float = Field(0.5, gt=0)
    """Seconds that the answers of one request wait for the reward model's scores; then it goes without them."""


_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]


class RewardFields(TypedDict, total=False):
    """What of trainer.reward_model.RewardConfig, which describes it, is to differ."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    heads: _Count
    epochs: _Count
    batch: _Count
    microbatch_tokens: _Count
    learning_rate: _Positive
    centring: _NotNegative
    side_term: bool
    max_grad_norm: _Positive
    seed: _Seed


class PPOFields(TypedDict, total=False):
    """What of trainer.ppo.PPOConfig, which describes it, is to differ."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    steps: _Count
    rollouts: _Count
    epochs: _Count
    minibatch: _Count
    microbatch_tokens: _Count
    learning_rate: _Positive
    beta: _NotNegative
    gamma: _Share
    lam: _Share
    clip: Annotated[float, Field(gt=0, lt=1)]
    value_clip: _Positive
    temperature: _Positive
    missing_end_score: Annotated[float, Field(allow_inf_nan=False)] | None
    kl_budget: _Positive
    importance_cap: _Positive
    max_grad_norm: _Positive
    seed: _Seed


class TrainingSettings(_Section):
    min_votes: int = Field(100, ge=1)
    """Fewer decisive votes on the training side than this, and a run fails: there is too little to learn from."""
    max_rater_share: float = Field(0.1, gt=0, le=1)
    """Largest part of the votes' total weight that one person's votes may have, if there are people enough."""
    uncapped_votes: int = Field(200, ge=0)
    """A person's first so many votes count in full, whatever their share."""
    trusted_weight: float = Field(0.5, ge=0)
    """What a trusted pair weighs beside a vote."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Votes on longer prompts are left out."""
    max_answer_tokens: int = Field(256, ge=1)
    """Votes on longer answers are left out; answers in training are cut off there."""
    rank: int = 16
    """Rank of the adapters: 1, 8, 16, 32 or 64; `engine.max_lora_rank` must be as large."""
    alpha: int = Field(32, ge=1)
    """The adapters' scale is alpha / rank."""
    bf16: bool = True
    """Matrix products in bfloat16: twice as fast, and a little less exact."""
    start_from: Literal["base", "incumbent"] = "base"
    """The policy that a run improves: the base model, or the policy that serves."""
    rollouts: Literal["auto", "local", "engine"] = "auto"
    """Who writes the answers that PPO learns from: `local` the trainer, `engine` the running vLLM, `auto` the running
    vLLM where training has a GPU, and else the trainer."""
    wait_for_chat_s: float = Field(5.0, ge=0)
    """Seconds that training waits after every two of work, at most, while the engine answers people; 0: never."""
    threads: int = Field(0, ge=0)
    """Processor threads that training takes; 0: all."""
    nice: int = Field(10, ge=0, le=19)
    """How far training stands back for everything else on the machine."""
    seed: int = 0
    """Of everything random in a run."""
    reward: RewardFields = {}
    """Fields of trainer.reward_model.RewardConfig, e.g. { heads = 1, learning_rate = 1e-4 }."""
    ppo: PPOFields = {}
    """Fields of trainer.ppo.PPOConfig, e.g. { steps = 100, beta = 0.1 }."""

    @field_validator("rank")
    @classmethod
    def _rank_that_vllm_serves(cls, rank: int) -> int:
        if rank not in (1, 8, 16, 32, 64):
            raise ValueError("vLLM serves adapters of rank 1, 8, 16, 32 or 64")
        return rank


class GateSettings(_Section):
    mode: Literal["trial", "offline", "manual"] = "trial"
    """What becomes of a candidate that passed the gate's checks: `trial` a live duel with the policy that serves
    decides, `offline` it serves at once, `manual` it waits for an operator's `nightshift policies promote`."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Chance that the votes of one trial promote a policy that is no better: it is won at evidence of 1 / alpha. Each
    further trial against the same policy needs twice the evidence, so over any number of them the chance stays below
    2 alpha; a policy that comes to serve starts the count anew."""
    max_trial_votes: int = Field(2000, ge=1)
    """Votes after which a trial that nobody has won ends, and its candidate is rejected."""
    duel_share: float = Field(0.5, gt=0, le=1)
    """Share of the comparisons that become duels while a trial runs."""
    watch_share: float = Field(0.1, ge=0, le=1)
    """Share of the comparisons that become duels with the predecessor after a promotion; 0: it is not watched."""
    max_watch_votes: int = Field(500, ge=1)
    """Votes after which the predecessor is let go."""
    kl_budget: float = Field(12.0, gt=0)
    """Check of a candidate: its mean KL divergence from the base model, nats an answer, is at most this."""
    length_drift: float = Field(0.25, gt=0)
    """Check: its answers are longer or shorter on average by at most this part."""
    unfinished_tolerance: float = Field(0.02, ge=0, le=1)
    """Check: its share of answers without an end is higher by at most this, beyond chance."""
    repetition_tolerance: float = Field(0.02, ge=0, le=1)
    """Check: its share of answers that repeat themselves is higher by at most this, beyond chance."""
    probe_tolerance: float = Field(0.02, ge=0, le=1)
    """Checks: its share of right answers to the frozen probes, of each kind, is lower by at most this, beyond
    chance."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="NIGHTSHIFT_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )

    state: Annotated[Path, Field(default=Path("var"))]
    """The folder that holds everything: database, policies, logs."""
    model: str = str(STARTER)
    """The base model: a folder or a Hugging Face id."""
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    chat: ChatSettings = ChatSettings()
    comparisons: ComparisonSettings = ComparisonSettings()
    serving: ServingSettings = ServingSettings()
    training: TrainingSettings = TrainingSettings()
    gate: GateSettings = GateSettings()

    @model_validator(mode="after")
    def _engine_takes_what_training_makes(self) -> Self:
        if self.training.rank > self.engine.max_lora_rank:
            raise ValueError(
                f"training.rank is {self.training.rank}, and the engine serves adapters up to engine.max_lora_rank ="
                f" {self.engine.max_lora_rank}: raise that, or lower this"
            )
        return self

    @property
    def database(self) -> Path:
        return self.state / "nightshift.db"

    @property
    def wants_scores(self) -> bool:
        """Whether anything that is shown depends on the reward model's scores."""
        return self.comparisons.active_share > 0 or self.serving.best_of_n > 1

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = Path(os.environ.get("NIGHTSHIFT_CONFIG", "nightshift.toml"))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml)


NOT_SETTINGS = {"CONFIG", "URL", "API_KEY"}
"""Names in the environment with another meaning: the file of settings, and what `nightshift chat` talks to."""


class BadSettings(ValueError):
    """A setting that cannot be used; the message says which and why."""


def load_settings(**given: object) -> Settings:
    """The settings in force; `given` (of the command line) wins. Raises BadSettings."""
    fields = {name.upper() for name in Settings.model_fields}
    for name in os.environ:
        first = name.upper().removeprefix("NIGHTSHIFT_").partition("__")[0]
        if name.upper().startswith("NIGHTSHIFT_") and first not in fields | NOT_SETTINGS:
            raise BadSettings(f"{name} in the environment is no setting; there are {', '.join(sorted(fields))}.")
    config = os.environ.get("NIGHTSHIFT_CONFIG")
    if config and not Path(config).is_file():
        raise BadSettings(f"NIGHTSHIFT_CONFIG names {config}, which is not a file.")
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise BadSettings("Bad setting: " + "; ".join(_what_is_wrong(**one) for one in error.errors())) from None
    except SettingsError as error:
        value = getattr(error.__cause__, "doc", None)
        names = [name for name in os.environ if name.upper().startswith("NIGHTSHIFT_") and os.environ[name] == value]
        if not names:
            raise BadSettings(f"The settings cannot be read: {error}") from None
        raise BadSettings(
            f"{names[0]} in the environment must be JSON, and {value} is not: {error.__cause__}."
            " For example NIGHTSHIFT_ENGINE__URLS='[\"http://10.0.0.5:8000\"]' or NIGHTSHIFT_TRAINING__PPO__STEPS=64."
        ) from None
    except ValueError as error:
        raise BadSettings(f"{config or 'nightshift.toml'} cannot be read: {error}") from None


def _what_is_wrong(loc: tuple[int | str, ...], type: str, msg: str, **more: object) -> str:
    place = ".".join(str(part) for part in loc)
    if type == "extra_forbidden":
        return f"there is no {place}"
    return f"{place}: {msg}" if place else msg.removeprefix("Value error, ")

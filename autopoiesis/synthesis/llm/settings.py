"""What an operator can set about language models that write policies."""

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Price = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class LlmSettings(BaseModel):
    """An OpenAI-compatible endpoint, its models, and how much may be spent on them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = "https://api.openai.com/v1"
    """Of the endpoint, with its `/v1`."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; empty: the endpoint wants none."""
    models: tuple[str, ...] = ()
    """Models to choose from."""
    prices: dict[str, tuple[Price, Price]] = {}
    """Model → US dollars per million prompt tokens and per million answer tokens."""
    temperature: float = Field(0.8, ge=0.0, le=2.0)
    max_tokens: int = Field(4096, ge=64, le=65536)
    """Longest answer [tokens]."""
    policies: int = Field(4, ge=1, le=24)
    """Policies asked for at a time."""
    timeout_s: float = Field(60.0, gt=0.0, le=3600.0)
    """Longest time one attempt may take."""
    attempts: int = Field(4, ge=1, le=10)
    """Attempts at one question, the first included."""
    budget_usd: float = Field(0.5, ge=0.0)
    """Most that one cycle may spend."""
    budget_usd_per_day: float = Field(5.0, ge=0.0)
    budget_tokens: int = Field(300_000, ge=0)
    """Most tokens, of prompts and answers, that one cycle may use."""
    budget_tokens_per_day: int = Field(3_000_000, ge=0)
    exchanges_mib: int = Field(64, ge=1)
    """Room for recorded exchanges; the oldest go first."""
    idle_below: float = Field(0.25, gt=0.0, le=1.0)
    """The fleet is asked only while its busiest replica is used less than this."""
    fleet_priority: int = Field(1_000_000, ge=0)
    """vLLM's `priority` of questions to the fleet: the higher, the later; 0: do not send one."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"{url!r} is no address; give one like https://api.openai.com/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("an address with a secret in it would be stored; use api_key_env")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, name: str) -> str:
        if name and not (name.isidentifier() and name.isascii()):
            raise ValueError("this takes the name of an environment variable, not the key itself")
        return name

    @model_validator(mode="after")
    def _no_strangers(self) -> Self:
        for model in self.prices:
            if self.models and model not in self.models:
                raise ValueError(
                    f"there is a price for {model!r}, which is not among the models: {', '.join(self.models)}"
                )
        return self

    def cost_usd(self, model: str, prompt_tokens: int, answer_tokens: int) -> float:
        """Return what tokens cost; 0 where the model's price is not known."""
        prompt_usd, answer_usd = self.prices.get(model, (0.0, 0.0))
        return (prompt_tokens * prompt_usd + answer_tokens * answer_usd) / 1e6

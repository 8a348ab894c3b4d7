"""Request fields that the routes which generate text share: sampling, and where a text ends."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from deployments.protocol.base import StrictModel
from deployments.protocol.extra_fields import GENERATION, STREAM_OPTIONS

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIASES = 1024
MAX_N = 128
MAX_LOGPROBS = 20


class StreamOptions(StrictModel):
    """`stream_options` of a request."""

    extra_fields = STREAM_OPTIONS

    include_usage: bool = Field(False, description="a last chunk has the usage")
    continuous_usage_stats: bool = Field(False, description="with include_usage: every chunk has the usage so far")


class SamplingFields(StrictModel):
    """Fields of every request that generates text.

    Names, defaults and ranges are OpenAI's; top_k, min_p, repetition_penalty, min_tokens and ignore_eos are vLLM's.
    """

    model: str
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, ge=0, le=1, description="0 keeps the likeliest token only")
    top_k: int = Field(0, ge=-1, description="0 and -1 keep all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=MAX_LOGIT_BIASES, description="token id -> bias added to its logit"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool = False
    user: str | None = Field(None, description="id of the end user: a canary gets all of a user's requests or none")
    safety_identifier: str | None = Field(None, description="newer name of user")
    service_tier: str | None = Field(None, description="there is one, `default`, which the response then names")
    ignore_eos: bool = False

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, logit_bias: dict[str, float]) -> dict[str, float]:
        for key in logit_bias:
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError(f'{key[:20]!r} is not a token id: keys must be token ids, such as "42"')
        return logit_bias

    @field_validator("stop")
    @classmethod
    def _few_stop_strings(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > MAX_STOP_STRINGS or any(not 0 < len(s) <= 256 for s in strings):
            raise ValueError(f"expected at most {MAX_STOP_STRINGS} stop strings of 1 to 256 characters")
        return stop

    @field_validator("min_tokens", check_fields=False)
    @classmethod
    def _min_within_max(cls, min_tokens: int, info: ValidationInfo) -> int:
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            limit = info.data.get(name)
            if limit is not None and min_tokens > limit:
                raise ValueError(f"must not exceed {name}, which is {limit}")
        return min_tokens

    @property
    def end_user(self) -> str | None:
        """Id of the end user, by either name."""
        return self.user if self.user is not None else self.safety_identifier

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def token_biases(self) -> dict[int, float]:
        """`logit_bias` by token id."""
        return {int(token_id): bias for token_id, bias in self.logit_bias.items()}


class GenerationFields(SamplingFields):
    """Fields of chat completions and of completions."""

    extra_fields = GENERATION

    n: int = Field(1, ge=1, le=MAX_N)
    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _options_require_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and options.model_fields_set and not info.data.get("stream"):
            raise ValueError("requires stream: true")
        return options

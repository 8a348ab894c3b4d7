"""The request that a model replica accepts. Plain data, importable without torch."""

from dataclasses import dataclass, replace

from deployments.engine.request import SamplingParams
from deployments.structured_outputs.grammar import Grammar
from training.registry.manifest import AdapterManifest


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to continue `n` times with an exact adapter version, or with the base if `adapter` is None.

    Answers are constrained to `grammar`; None leaves them free.
    `may_shorten` says that no length was requested, so that `sampling.max_tokens` is only the default.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterManifest | None
    n: int = 1
    grammar: Grammar | None = None
    may_shorten: bool = False

    @property
    def max_total_tokens(self) -> int:
        """Tokens of the prompt and all answers if none ends early."""
        return len(self.prompt_token_ids) + self.n * self.sampling.max_tokens

    @property
    def min_total_tokens(self) -> int:
        """The same, if the answers are as short as `may_shorten` allows."""
        shortest = max(1, self.sampling.min_tokens) if self.may_shorten else self.sampling.max_tokens
        return len(self.prompt_token_ids) + self.n * shortest

    def shortened(self, max_total_tokens: int) -> "GenerationRequest":
        """The same request with answers that take at most `max_total_tokens` with the prompt."""
        max_tokens = (max_total_tokens - len(self.prompt_token_ids)) // self.n
        return replace(self, sampling=replace(self.sampling, max_tokens=max_tokens))

"""The request that a model replica accepts. Plain data, importable without torch."""

from dataclasses import dataclass

from deployments.engine.request import SamplingParams
from training.registry.manifest import AdapterManifest


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to continue `n` times with an exact adapter version, or with the base if `adapter` is None.

    Answers are constrained to `grammar`, as `structured_outputs.grammars.grammar_of` returns it; None leaves them free.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterManifest | None
    n: int = 1
    grammar: str | None = None

    @property
    def max_total_tokens(self) -> int:
        """Tokens of the prompt and all answers if none ends early."""
        return len(self.prompt_token_ids) + self.n * self.sampling.max_tokens

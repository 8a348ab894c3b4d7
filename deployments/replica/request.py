"""What the ingress sends to a model replica: importable without torch."""

from dataclasses import dataclass

from deployments.engine.request import SamplingParams
from training.registry.manifest import AdapterManifest


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to continue `n` times, and exactly which adapter version does it (None: the base).

    Answers are of `grammar`, which `grammars.py` wrote and compiles; None leaves them free.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterManifest | None
    n: int = 1
    grammar: str | None = None

    @property
    def max_total_tokens(self) -> int:
        """Of the prompt and all answers, if none ends early."""
        return len(self.prompt_token_ids) + self.n * self.sampling.max_tokens

"""The sizes in a Llama's `config.json`: parameters of the base and of an adapter, without weights or torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.config.train_config import LLAMA_LINEARS, LlamaLinear, LoraSettings


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes that memory depends on, from a Llama's `config.json`."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, llama_config: Mapping[str, Any]) -> "LlamaShape":
        """Read `config.json`."""
        hidden, num_heads = int(llama_config["hidden_size"]), int(llama_config["num_attention_heads"])
        return cls(
            hidden=hidden,
            intermediate=int(llama_config["intermediate_size"]),
            num_layers=int(llama_config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(llama_config.get("num_key_value_heads") or num_heads),
            head_dim=int(llama_config.get("head_dim") or hidden // num_heads),
            vocab=int(llama_config["vocab_size"]),
            tied=bool(llama_config.get("tie_word_embeddings", False)),
        )

    @property
    def attention(self) -> int:
        """Width of the queries."""
        return self.num_heads * self.head_dim

    @property
    def linears(self) -> dict[LlamaLinear, tuple[int, int]]:
        """(in, out) of every linear layer of a block."""
        kv = self.num_kv_heads * self.head_dim
        sizes = (
            (self.hidden, self.attention), (self.hidden, kv), (self.hidden, kv), (self.attention, self.hidden),
            (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden),
        )  # fmt: skip
        return dict(zip(LLAMA_LINEARS, sizes, strict=True))

    @property
    def num_linear_parameters(self) -> int:
        """Parameters that are held in 4 bit."""
        return self.num_layers * sum(a * b for a, b in self.linears.values())

    @property
    def num_other_parameters(self) -> int:
        """Embeddings, lm_head and norms, which stay in the compute dtype."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + (2 * self.num_layers + 1) * self.hidden

    @property
    def num_parameters(self) -> int:
        """All parameters of the base."""
        return self.num_linear_parameters + self.num_other_parameters

    def num_trainable(self, lora: LoraSettings, *, matrices_from: int = 0) -> int:
        """Parameters of an adapter: A [r, in] and B [out, r] of every target; of matrices that have `matrices_from`."""
        matrices = [lora.r * width for name in lora.targets for width in self.linears[name]]
        return self.num_layers * sum(size for size in matrices if size >= matrices_from)

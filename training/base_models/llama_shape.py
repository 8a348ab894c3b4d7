"""The geometry of a Llama: its linear layers by name, and all sizes from `config.json`, without weights or torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

LlamaLinear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Every linear layer of a Llama block, in its order; lm_head is left alone, as in the QLoRA paper.
LLAMA_LINEARS: tuple[LlamaLinear, ...] = get_args(LlamaLinear)
ATTENTION_LINEARS, MLP_LINEARS = LLAMA_LINEARS[:4], LLAMA_LINEARS[4:]


@dataclass(frozen=True, slots=True)
class LlamaDims:
    """The sizes in a Llama's `config.json`."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, llama_config: Mapping[str, Any]) -> "LlamaDims":
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

    def num_trainable(self, r: int, targets: Collection[LlamaLinear], *, matrices_from: int = 0) -> int:
        """Parameters of an adapter of rank `r`: A [r, in] and B [out, r] of every target.

        With `matrices_from` only those of matrices that have at least so many parameters.
        """
        matrices = [r * width for name in targets for width in self.linears[name]]
        return self.num_layers * sum(size for size in matrices if size >= matrices_from)


def module_path(linear: LlamaLinear) -> str:
    """Where transformers keeps a linear layer within a block, such as `self_attn.q_proj`."""
    return f"{'self_attn' if linear in ATTENTION_LINEARS else 'mlp'}.{linear}"

"""A Llama's tokenizer as GGUF metadata, in the two ways that llama.cpp knows: `gpt2` and `llama`.

`gpt2` is byte-level BPE with merges (Llama 3, SmolLM), `llama` is SentencePiece's BPE with a score for each token
(Llama 2), whose scores are read off the order of the merges. `training.export.gguf` writes what this reads.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from training.base_models.resolve import BaseCheckpoint
from training.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp needs to tokenize as the base's tokenizer.json does.

    Attributes:
        model: `gpt2` or `llama`, llama.cpp's names for the two kinds.
        pre: llama.cpp's name for how a text is split before merging.
        tokens: one for each row of the embedding; ids without a token are filled up.
        types: of `tokens`.
        merges: `left right`, best first; for `gpt2`.
        scores: of `tokens`, higher merges first; for `llama`.
        special: token ids by what they are for: bos, eos, unk, pad.
        add_bos: whether the tokenizer puts bos in front of a text.
        add_space_prefix: whether a text is tokenized as if a space preceded it.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: list[str]
    types: "list[TokenType]"
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    add_bos: bool
    add_space_prefix: bool

    def write(self, writer: "GGUFWriter", eot_token_id: int) -> None:
        """Add it to a GGUF file's metadata; `eot_token_id` ends an assistant's turn."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)
        for use, token_id in self.special.items():
            getattr(writer, f"add_{use}_token_id")(token_id)
        writer.add_eot_token_id(eot_token_id)
        writer.add_add_bos_token(self.add_bos)


def read_vocabulary(base: BaseCheckpoint) -> Vocabulary:
    """Read the base's tokenizer.json and tokenizer_config.json.

    Raises:
        ExportError: it is of a kind that llama.cpp has no name for.
    """
    from gguf import TokenType
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
    written: dict[str, Any] = json.loads((base.path / "tokenizer.json").read_text(encoding="utf-8"))
    model = written["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"the tokenizer of {base.source!r} is {model.get('type')}: GGUF is written for BPE only")
    sentencepiece = bool(model.get("byte_fallback"))

    by_id = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    size = int(base.llama_config()["vocab_size"])
    if max(by_id) >= size:
        raise ExportError(f"the tokenizer of {base.source!r} has token {max(by_id)}, its embedding {size} rows")
    tokens = [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(size)]
    types = [TokenType.NORMAL if token_id in by_id else TokenType.UNUSED for token_id in range(size)]
    for token_id, token in by_id.items():
        if sentencepiece and _BYTE.fullmatch(token):
            types[token_id] = TokenType.BYTE
    for added in written["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    special = _special_ids(base, tokenizer)
    if sentencepiece and (unk := tokenizer.token_to_id(model.get("unk_token") or "")) is not None:
        types[unk] = TokenType.UNKNOWN
        special["unk"] = unk

    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else _pre_tokenizer(base, written["pre_tokenizer"]),
        tokens=tokens,
        types=types,
        merges=[] if sentencepiece else merges,
        scores=_scores(tokens, merges) if sentencepiece else [],
        special=special,
        add_bos="bos" in special and tokenizer.encode("a").ids[:1] == [special["bos"]],
        add_space_prefix=sentencepiece and tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁"),
    )


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair whose result has the highest score: the earlier a merge, the higher."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), place)
    return [float(-rank[token]) if token in rank else 0.0 for token in tokens]


def _pre_tokenizer(base: BaseCheckpoint, written: dict[str, Any] | None) -> str:
    steps = (written or {}).get("pretokenizers") or [written or {}]
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        case ["Split", "ByteLevel"] if steps[0]["pattern"].get("Regex") == _LLAMA_3_SPLIT:
            return "llama-bpe"
        case kinds:
            raise ExportError(
                f"the tokenizer of {base.source!r} splits texts in a way that has no name in GGUF "
                f"({', '.join(map(str, kinds))}): export it with --merged and convert that folder with llama.cpp"
            )


def _special_ids(base: BaseCheckpoint, tokenizer: Any) -> dict[str, int]:
    path = base.path / "tokenizer_config.json"
    named: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = base.llama_config()
    found = {}
    for use in ("bos", "eos", "pad"):
        token = named.get(f"{use}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token_id = tokenizer.token_to_id(token) if token else config.get(f"{use}_token_id")
        token_id = token_id[0] if isinstance(token_id, list) else token_id
        if isinstance(token_id, int) and token_id >= 0:
            found[use] = token_id
    return found

"""`python -m deployments.engine.bench`: how fast the bare engine is on this machine, without Ray and HTTP.

Beside `corral bench` it tells what serving costs on top; on a machine with a GPU and no weights at hand, `--shape`
measures a random model of a Llama's sizes. Greedy answers of a fixed length to prompts of a fixed length.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deployments.engine.engine import Engine
from deployments.engine.request import Delta, EngineRequest, SamplingParams
from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.llama_shape import LlamaDims, module_path
from training.base_models.nf4 import Quantization, compute_dtype_on, load_quantized
from training.base_models.resolve import resolve_base_model

# hidden, intermediate, layers, heads, key-value heads, vocabulary: the released models' config.json
_SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
}


@dataclass(frozen=True, slots=True)
class Level:
    """One measurement: `num_adapters` adapters in turn, `concurrency` answers at once.

    Attributes:
        tokens_per_s: new tokens of all answers over the time from first request to last token.
        ttft_ms, tpot_ms: medians of time to first token and time per token after it.
    """

    num_adapters: int
    concurrency: int
    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float


def random_llama(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random model of a Llama's sizes with its linear layers in NF4, quantized layer by layer on `device`."""
    from bitsandbytes.nn import Linear4bit

    hidden, intermediate, layers, heads, kv_heads, vocab = _SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=4096,
        dtype=dtype,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    quantized = Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                    )
                    weight = torch.randn(linear.out_features, linear.in_features) * linear.in_features**-0.5
                    quantized.weight = type(quantized.weight)(
                        weight.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True
                    )
                    setattr(block, name, quantized.to(device))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = nn.Parameter(torch.ones(hidden, device=device, dtype=dtype), requires_grad=False)
    model.model.norm.weight = nn.Parameter(torch.ones(hidden, device=device, dtype=dtype), requires_grad=False)
    for module in (model.model.embed_tokens, model.lm_head):
        weight = torch.randn(vocab, hidden, device=device, dtype=dtype) * hidden**-0.5
        module.weight = nn.Parameter(weight, requires_grad=False)
    return cast(LlamaForCausalLM, model.eval())


def random_adapter(config: LlamaConfig, r: int, seed: int) -> dict[str, torch.Tensor]:
    """PEFT's tensors of a random LoRA on all linear layers."""
    generator = torch.Generator().manual_seed(seed)
    dims = LlamaDims.of(config.to_dict())
    tensors = {}
    for i in range(dims.num_layers):
        for linear, (n_in, n_out) in dims.linears.items():
            prefix = f"base_model.model.model.layers.{i}.{module_path(linear)}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(r, n_in, generator=generator) * n_in**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n_out, r, generator=generator) * 0.01
    return tensors


def measure(
    engine: Engine,
    adapters: Sequence[str | None],
    concurrency: int,
    *,
    rng: random.Random,
    prompt_tokens: int,
    max_tokens: int,
    num_requests: int | None = None,
) -> Level:
    """Answer random prompts over `adapters` in turn, `concurrency` at a time, by default twice as many."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    started: dict[int, float] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    todo = list(range(num_requests or 2 * concurrency))
    active: set[int] = set()

    def add(n: int) -> None:
        def receive(deltas: list[Delta]) -> None:
            last[n] = time.perf_counter()
            first.setdefault(n, last[n])
            if deltas[-1].finish_reason is not None:
                active.discard(n)

        prompt = [rng.randrange(1, 500) for _ in range(prompt_tokens)]  # none that the prefix cache knows
        started[n] = time.perf_counter()
        active.add(n)
        engine.add_request(EngineRequest(str(n), prompt, sampling, adapters[n % len(adapters)]), receive)

    start = time.perf_counter()
    while todo or active:
        while todo and len(active) < concurrency:
            add(todo.pop(0))
        engine.step()
    elapsed = time.perf_counter() - start
    return Level(
        num_adapters=sum(adapter is not None for adapter in adapters),
        concurrency=concurrency,
        tokens_per_s=round(len(started) * max_tokens / elapsed, 1),
        ttft_ms=round(1e3 * statistics.median(first[n] - started[n] for n in started), 1),
        tpot_ms=round(1e3 * statistics.median((last[n] - first[n]) / max(max_tokens - 1, 1) for n in started), 2),
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m deployments.engine.bench", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--base-model", default=EMBEDDED_MODEL)
    what.add_argument("--shape", choices=sorted(_SHAPES), help="a random model of these sizes instead")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--num-requests", type=int, help="per level; default: 2 per stream")
    parser.add_argument("--adapters", type=int, default=4, help="random adapters of rank 16, beside the base alone")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads on a CPU")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quantization = Quantization()
    if args.shape:
        model: Any = random_llama(args.shape, device, getattr(torch, compute_dtype_on(device, quantization)))
    else:
        model = load_quantized(resolve_base_model(args.base_model), quantization, device)
    levels = [int(level) for level in args.concurrency.split(",")]
    engine = Engine(
        model,
        max_model_len=max(256, args.prompt_tokens + args.max_tokens),
        max_num_seqs=max(levels),
        max_loras=max(args.adapters, 1),
    )
    names = [f"random-{i}" for i in range(args.adapters)]
    for i, name in enumerate(names):
        engine.load_adapter(name, engine.lora_weights(random_adapter(model.config, 16, i), 2.0))
    mixes: list[list[str | None]] = [[None], [*names]] if names else [[None]]
    rng = random.Random(0)
    measure(engine, mixes[-1], 2, rng=rng, prompt_tokens=args.prompt_tokens, max_tokens=4)  # warm
    print(f"{args.shape or args.base_model} on {_device_name(device)}, {model.dtype}, torch {torch.__version__}")
    print(f"{'adapters':>8} {'streams':>8} {'tokens/s':>9} {'TTFT ms':>8} {'TPOT ms':>8}")
    results = []
    for adapters in mixes:
        for concurrency in levels:
            level = measure(
                engine,
                adapters,
                concurrency,
                rng=rng,
                prompt_tokens=args.prompt_tokens,
                max_tokens=args.max_tokens,
                num_requests=args.num_requests,
            )
            results.append(level)
            print(
                f"{level.num_adapters:>8} {level.concurrency:>8} {level.tokens_per_s:>9} "
                f"{level.ttft_ms:>8} {level.tpot_ms:>8}",
                flush=True,
            )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "levels": [asdict(level) for level in results]}, file, indent=1)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()

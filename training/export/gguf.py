"""Writes a merged model as a GGUF file, for llama.cpp and the tools built on it.

Layout, names and permutation follow llama.cpp's convert_hf_to_gguf.py for LlamaForCausalLM. Tensors are merged,
quantized and written one at a time.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from training.errors import ExportError
from training.export.gguf_vocabulary import read_vocabulary
from training.export.merge import MergedWeights

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

GgufType = Literal["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)


def write_gguf(
    weights: MergedWeights,
    file: Path,
    gguf_type: GgufType,
    *,
    name: str,
    description: str,
    chat_template: str,
    eot_token_id: int,
) -> None:
    """Write the merged model to `file`, with matrices in `gguf_type` and vectors in float32.

    With 4-bit types, the embedding and the output matrix are Q8_0: they affect quality more, and are a small part of a
    large model.

    Args:
        eot_token_id: the token that ends an assistant's turn.

    Raises:
        ExportError: GGUF cannot represent this base.
    """
    import gguf
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
    from transformers import LlamaConfig

    config: Any = LlamaConfig.from_pretrained(weights.base.path)
    vocabulary = read_vocabulary(weights.base)
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA])
    try:
        writer.add_name(name)
        writer.add_description(description)
        writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + gguf_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        rope_factors = _add_hyperparameters(writer, config)
        vocabulary.write(writer, eot_token_id)
        writer.add_chat_template(chat_template)

        name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
        planned_tensors: list[tuple[str, GGMLQuantizationType]] = []
        for tensor_name in sorted(name for shard in weights.shards.values() for name in shard):
            gguf_name = name_map.get_name(tensor_name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise ExportError(f"the base's tensor {tensor_name!r} has no GGUF name: export it with --merged")
            shape = weights.shape(tensor_name)
            tensor_type = _tensor_type(gguf_name, shape, gguf_type)
            planned_tensors.append((tensor_name, tensor_type))
            _add_tensor_info(writer, gguf_name, shape, tensor_type)
        if rope_factors is not None:
            writer.add_tensor_info("rope_freqs.weight", rope_factors.shape, rope_factors.dtype, rope_factors.nbytes)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor_type in planned_tensors:
            values = _permuted(tensor_name, weights.tensor(tensor_name).float().numpy(), config)
            writer.write_tensor_data(gguf.quants.quantize(values, tensor_type))
        if rope_factors is not None:
            writer.write_tensor_data(rope_factors)
    finally:
        writer.close()


def _add_hyperparameters(writer: "GGUFWriter", config: Any) -> "np.ndarray[Any, Any] | None":
    """Add sizes and rotary embedding; returns the divisor of each rotary frequency if they are scaled individually."""
    from gguf import RopeScalingType

    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope.get("rope_type", "default"):
        case "default":
            return None
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
            return None
        case "llama3":
            return llama_3_rope_factors(rope, head_dim)
        case other:
            raise ExportError(
                f"the base's rotary embedding has scaling {other!r}, which has no GGUF export: use --merged"
            )


def llama_3_rope_factors(rope: dict[str, Any], head_dim: int) -> "np.ndarray[Any, Any]":
    """Llama 3.1's divisor of each rotary frequency, [head_dim / 2] (transformers' `_compute_llama3_parameters`)."""
    import numpy as np

    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (pair / head_dim)
        smooth = (context / wavelength - low) / (high - low)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(float(rope["factor"]))
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _tensor_type(gguf_name: str, shape: tuple[int, ...], gguf_type: GgufType) -> "GGMLQuantizationType":
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if gguf_type in ("Q4_0", "Q4_1") and gguf_name in ("token_embd.weight", "output.weight"):
        gguf_type = "Q8_0"
    tensor_type = GGMLQuantizationType[gguf_type]
    block_size, _ = GGML_QUANT_SIZES[tensor_type]
    return tensor_type if shape[-1] % block_size == 0 else GGMLQuantizationType.F16


def _add_tensor_info(
    writer: "GGUFWriter", gguf_name: str, shape: tuple[int, ...], tensor_type: "GGMLQuantizationType"
) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quant_shape_to_byte_shape

    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    num_bytes = math.prod(shape) // block_size * block_bytes
    if tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if tensor_type == GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(gguf_name, shape, dtype, num_bytes)
    else:
        packed = quant_shape_to_byte_shape(shape, tensor_type)
        writer.add_tensor_info(gguf_name, packed, np.dtype(np.uint8), num_bytes, raw_dtype=tensor_type)


def _permuted(name: str, values: "np.ndarray[Any, Any]", config: Any) -> "np.ndarray[Any, Any]":
    """Rows of q and k in llama.cpp's rotary order, which pairs neighbours; transformers pairs halves."""
    linear = name.split(".")[-2]
    if linear not in ("q_proj", "k_proj"):
        return values
    num_heads = config.num_attention_heads if linear == "q_proj" else config.num_key_value_heads
    halves = values.reshape(num_heads, 2, len(values) // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)

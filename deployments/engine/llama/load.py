"""Which forward runs on this machine, and how much memory its KV cache gets.

`cpu_llama` runs compiled kernels on CPUs, `torch_llama` torch's operators on CUDA and wherever the kernels do not
compile. Both multiply by the NF4 weights that training used.
"""

import logging

import torch
from transformers import LlamaForCausalLM

from deployments.engine.llama.interface import Llama

logger = logging.getLogger(__name__)

_CPU_KV_CACHE_BYTES = 1 << 30
_CUDA_KV_CACHE_SHARE = 0.9  # the rest is for activations, graphs and adapters


def load_llama(
    model: LlamaForCausalLM, *, max_model_len: int, max_num_seqs: int, kv_cache_bytes: int | None, max_loras: int
) -> Llama:
    """The fastest forward that runs here. `model` is a transformers Llama in NF4; its weights are taken over."""
    from deployments.engine.llama.cpu_kernels import KernelsUnavailable
    from deployments.engine.llama.cpu_llama import CpuLlama
    from deployments.engine.llama.torch_llama import TorchLlama

    if kv_cache_bytes is None:
        kv_cache_bytes = _spare_bytes(model.device)
    sizes = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "kv_cache_bytes": kv_cache_bytes}
    if model.device.type == "cpu":
        try:
            return CpuLlama(model, **sizes, max_loras=max_loras)
        except KernelsUnavailable as reason:
            logger.warning("the CPU kernels are not used, torch's operators are, several times slower: %s", reason)
    return TorchLlama(model, **sizes)


def _spare_bytes(device: torch.device) -> int:
    """What a KV cache may take when nobody says: a gibibyte on a CPU, on CUDA most of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_KV_CACHE_SHARE)
    return _CPU_KV_CACHE_BYTES

"""torch.distributed as a worker of a run sees it, which may also be the only one and without a process group."""

import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """This worker's rank and the number of workers; (0, 1) where torch.distributed is not initialized."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

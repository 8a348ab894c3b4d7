"""A Ray of this machine alone, which ends with the driver and leaves the cores to the steps of training.

`training.ray_train.fit` starts it where there is no cluster. What a Ray does beside training is a few percent of two
cores.
"""

import os
from typing import TYPE_CHECKING, Any

from training.local_ray.cpu_priority import standing_back
from training.ray_token import ask_for_a_token

if TYPE_CHECKING:
    from ray.train.v2.torch.torch_trainer import TorchTrainer

# Every process of this Ray inherits them; what the user has set stays.
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # 15 by default: any other program would take the cores from training
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # watches for nodes that leave
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # new log files are looked for twice, not ten times a second
    "RAY_DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S": "5",  # not 0.4
    "RAY_raylet_check_gc_period_milliseconds": "2000",  # not 100: nothing large is in its object store
    "RAY_kill_idle_workers_interval_ms": "2000",  # not 200
}


def start(**options: Any) -> None:
    """`ray.init` with its `options`; the processes of this Ray stand back behind the threads of a step."""
    import ray

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ask_for_a_token()
    with standing_back():
        ray.init(address="local", include_dashboard=False, **options)


def trainer_class() -> "type[TorchTrainer]":
    """TorchTrainer without two actors that have nothing to do here but wake up a hundred times a second."""
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback  # for Ray Data, which is not used
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,  # for placement groups that outlive the controller; this Ray ends with it
    )
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class PrivateTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    return PrivateTrainer

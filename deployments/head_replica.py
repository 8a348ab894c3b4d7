"""How Ray Serve runs the deployments that are the one owner of state on the head node's disk."""

from typing import Any

HEAD_REPLICA: dict[str, Any] = {
    "num_replicas": 1,
    "max_surge_percent": 100,  # on redeployment, the new replica starts before the old one stops
    "max_ongoing_requests": 1000,
    "health_check_period_s": 1,  # how soon Serve notices that it died
    "ray_actor_options": {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    "graceful_shutdown_timeout_s": 10,
}

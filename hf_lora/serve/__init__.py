"""Many adapters on Ray Serve: multiplexed over replicas, mixed requests in one forward. Needs `hf_lora[serve]`."""

from .app import app, build

__all__ = ["app", "build"]

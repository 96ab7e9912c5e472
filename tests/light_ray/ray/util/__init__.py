"""See `ray`."""

from ray.util import scheduling_strategies

__all__ = ["scheduling_strategies"]

"""Where a task goes: here, always."""

from typing import Any


class NodeAffinitySchedulingStrategy:
    def __init__(self, node: str, soft: bool) -> None: ...


class PlacementGroupSchedulingStrategy:
    def __init__(self, group: Any, bundle: int) -> None: ...

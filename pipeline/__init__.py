"""How a run happens: command line, plan, run directory, executors, progress. Knows no model.

In Python: `from pipeline import Run, load_config, run` (docs/python.md). Importing the package loads none of what they need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Run, run
    from pipeline.existing import config_given as load_config

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_config", "run"]

_PUBLIC = {
    "Run": ("pipeline.api", "Run"),
    "run": ("pipeline.api", "run"),
    "load_config": ("pipeline.existing", "config_given"),
}


def __getattr__(name: str) -> Any:
    """The public names, when they are first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)

"""How a run happens: command line, plan, run directory, executors, progress. Knows no model.

In Python: `from pipeline import Run, load_config, run` (docs/python.md). Importing the package loads none of what they need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Run, run
    from pipeline.config_file import load_config

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_config", "run"]

_PUBLIC = {"Run": "pipeline.api", "run": "pipeline.api", "load_config": "pipeline.config_file"}


def __getattr__(name: str) -> Any:
    """The public names, when they are first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)

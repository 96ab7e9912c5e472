"""How a run happens: command line, plan, run directory, executors, progress. Knows no model."""

__version__ = "0.1.0"

"""How a run happens: command line, plan, run directory, executors, progress. Knows no model."""

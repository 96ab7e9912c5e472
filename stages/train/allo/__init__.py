"""ALLO (arXiv 2406.12606): few entries of the weights are trained, forgetting before learning, on key tokens. docs/methods.md section 7."""

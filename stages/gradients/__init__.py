"""Per-pair preference gradients, compressed to sketches while the backward pass runs."""

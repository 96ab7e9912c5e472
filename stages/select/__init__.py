"""Selection of the training pairs that are kept."""

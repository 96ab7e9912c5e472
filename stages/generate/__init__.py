"""N answers per prompt from the round's policy."""

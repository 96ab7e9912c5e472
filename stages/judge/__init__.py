"""Scores for answers by a judge model (docs/methods.md section 1)."""

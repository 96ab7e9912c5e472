"""Scores for answers by a judge model (METHODS.md section 1)."""

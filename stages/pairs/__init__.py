"""Preference pairs: best against worst answer, or imported."""

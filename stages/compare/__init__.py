"""Selections side by side on one pool of pairs, from what a run has stored."""

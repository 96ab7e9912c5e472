"""Prompts, authored pairs, judge rubrics and example configs; read through importlib.resources."""

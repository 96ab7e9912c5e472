"""Inference engines behind one interface: vLLM, transformers, OpenAI-compatible servers."""

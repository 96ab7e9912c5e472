"""Evaluate stage: the model before and after training on prompts and pairs it was not trained on."""

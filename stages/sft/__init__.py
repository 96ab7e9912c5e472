"""Sft stage: TRL's SFTTrainer on conversations, before round 0."""

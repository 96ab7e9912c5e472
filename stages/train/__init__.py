"""Train stage: TRL's DPOTrainer on the curated pairs."""

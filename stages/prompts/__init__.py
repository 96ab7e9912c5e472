"""Reading, cleaning, deduplicating and splitting prompts."""

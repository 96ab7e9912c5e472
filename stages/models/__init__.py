"""Models by name: hub ids, folders, PEFT adapters, embedded ones."""

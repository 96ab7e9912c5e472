"""What `doctor` checks of models, text and speed, before hours are spent. Each check yields findings."""

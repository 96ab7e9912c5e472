"""Studies of whether curation does what it says, on real answers."""

"""Language directions, gradient surgery and the leave-one-out conflict score."""

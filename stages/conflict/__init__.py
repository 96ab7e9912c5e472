"""Language directions, their merging by gradient surgery, and the leave-one-out conflict score."""

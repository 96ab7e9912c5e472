"""Gradient surgery: from the Gram matrix of several gradients to the weights of one direction that conflicts with none."""

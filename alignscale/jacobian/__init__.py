"""The initial network's Jacobian in the forms in which it can be kept."""

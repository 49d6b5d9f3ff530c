"""Pure functions of weights and activations: what training has done to a network."""

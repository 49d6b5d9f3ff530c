"""alignscale trains wide neural networks without backpropagation through their current weights."""

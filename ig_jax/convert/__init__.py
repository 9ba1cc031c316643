"""PyTorch names and layouts, both directions."""

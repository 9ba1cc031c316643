"""Drawing samples: the engine under every way to sample, labels, and pictures on disk."""

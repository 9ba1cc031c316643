"""Weights and checkpoints on disk: files written whole, weight files of every kind, digests."""

"""Data sets, and the pipeline from them to batches."""

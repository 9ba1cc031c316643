"""Before a run: will it fit, and how fast is it."""

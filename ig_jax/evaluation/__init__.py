"""How good samples are: the five metrics, and the search for the best guidance."""

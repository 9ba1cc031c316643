"""Files that are written whole, and digests of what is in them."""

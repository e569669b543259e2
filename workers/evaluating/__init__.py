"""A block of items in, scores out."""

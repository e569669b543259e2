"""Which model is asked which items, and the answers."""

"""Finished points: finding, verifying, comparing, copying, publishing and pruning them."""

"""The files that a run leaves in its bucket, and the lease that says who may write them."""

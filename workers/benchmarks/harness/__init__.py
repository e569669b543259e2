"""Tasks of lm-evaluation-harness as sets of items."""

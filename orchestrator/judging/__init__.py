"""Pure decisions: scores in, statistics and verdicts out. No store, no clock."""

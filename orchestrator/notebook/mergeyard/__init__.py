"""The package `mergeyard` of a notebook; the distribution maps it to the top level."""

from orchestrator.notebook import Figure, Leaderboard, MergeyardError, Run, evaluate, merge, open_run, plan

__all__ = ["Figure", "Leaderboard", "MergeyardError", "Run", "evaluate", "merge", "open_run", "plan"]

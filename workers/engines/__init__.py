"""Resident models that answer prompts; `engine` has the promises of each."""

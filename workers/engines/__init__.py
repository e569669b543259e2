"""Resident models that answer prompts; `engine` says what each of them promises."""

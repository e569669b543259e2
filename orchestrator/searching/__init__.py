"""Which points of a space to ask next, from the scores so far; README.md has the rules."""

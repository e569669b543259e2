"""Items of an exact length in tokens, and scorers of answers: RULER's tasks, needle grids, perplexity by position.

`building` is the door: from what a job asks to sets of items, built once and the same for every point.
"""

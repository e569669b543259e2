"""Items of an exact length in tokens, and scorers of answers: RULER, needle grids, perplexity, and lm-eval's tasks.

`registry` has a row for each benchmark; `sets` builds the items that a job asks for, once for all points.
"""

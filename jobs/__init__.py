"""Jobs: frozen data and strict parsing of YAML text, without other I/O. The nouns:

    parent     a checkpoint that goes in
    recipe     a mergekit document, possibly with ${axis} placeholders
    grid       a recipe and its axes
    point      one recipe with every placeholder bound, and a name
    shard      one output safetensors file of a point
    task       one shard for a group of points: one worker's work
    receipt    the small record that a finished shard leaves
    manifest   the parts of a point, written last: its presence means done
    item       one question of a benchmark, at a given length in tokens
    score      one item's result for one point, from 0 to 1
    gate       a rule that turns the scores of two models into a verdict

`load_job` in `job.py` is the door; `README.md` beside this file explains every key.
"""

"""Who decides: plans from headers, drives tasks to receipts, remembers in object storage, and tells what came of it.

`cli` and `commands` are the front, `planning` and `driver` the middle, `pool` and `ray_pool` the way to workers.
"""

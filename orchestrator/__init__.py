"""Who decides: plans from headers, drives tasks to receipts, evaluates points, and reports.

Rooms from the ground up: words, watching, judging, records, planning, cluster, merging, evaluating, report, points,
nightly, commands, cli. Each uses only rooms before it.
"""

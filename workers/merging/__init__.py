"""One shard of many points: read the parents once, merge, write, leave receipts."""

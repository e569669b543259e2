"""What runs on a node: plain functions over a store, without Ray.

Merging: `checkpoint` finds tensors, `reading` fetches their bytes, `merging` computes every point's share with the
`methods`, `writing` publishes shards and receipts. Evaluating: `resident` keeps the parents, `engines` hold a model
that answers, `benchmarks` ask and score. `storage` is the only door to bytes anywhere.
"""

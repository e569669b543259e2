"""Work on a node: plain functions over a store, without Ray.

Merging: `checkpoints` finds tensors, `merging` reads each parent once, computes all points with the `methods`, and
writes shards and receipts. Evaluating: `merging.resident` keeps the parents, `engines` hold a model that answers,
`benchmarks` ask and score. `storage` is the only door to bytes anywhere.
"""

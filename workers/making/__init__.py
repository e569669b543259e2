"""Checkpoints made of other checkpoints without a merge method: low-rank adapters, mixtures of experts."""

"""Checkpoints as safetensors: headers, dtypes, digests, and where each tensor lies."""

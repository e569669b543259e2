"""Decides from headers what an adapter or a mixture of experts consists of, and writes it."""

"""The activations of a model that reads texts, for AIM."""

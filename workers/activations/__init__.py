"""Statistics of the activations of a model that reads texts, for AIM and regmean."""

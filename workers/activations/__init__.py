"""Statistics of the activations and gradients of a model that reads texts, for AIM, regmean and fisher."""

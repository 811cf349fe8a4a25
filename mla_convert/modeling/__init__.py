"""The converted model's code, part of it also written beside the weights, and the distillation loss."""

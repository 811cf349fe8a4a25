"""The converted model: a configuration and a modeling file, also written beside the weights."""

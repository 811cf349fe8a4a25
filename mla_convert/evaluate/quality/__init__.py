"""Perplexity, kinds of text, probes and tasks."""

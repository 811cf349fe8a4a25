"""Refinement of factorised layers by gradient steps."""

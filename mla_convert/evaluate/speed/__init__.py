"""Decode and prefill times."""

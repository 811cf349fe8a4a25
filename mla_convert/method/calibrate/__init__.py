"""Calibration: hidden states and statistics, one layer at a time."""

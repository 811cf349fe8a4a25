"""Texts of several kinds: `suite/` to measure on, `calibration/` to calibrate on. ATTRIBUTION.md has their sources."""

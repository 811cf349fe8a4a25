"""Conversion from source to written folder, dry runs, sweeps and inspection."""

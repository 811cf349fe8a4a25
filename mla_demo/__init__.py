"""The embedded demo: a small trained GQA Llama checkpoint and CC BY text slices (see ATTRIBUTION.md)."""

from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files(__name__)))

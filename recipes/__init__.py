"""Recipes: a name for a source with the settings that suit it, one YAML file each."""

"""Converted models in the form that serving engines know: DeepSeek-V3's."""

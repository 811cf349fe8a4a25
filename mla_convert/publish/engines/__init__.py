"""Export of converted models for serving engines, in DeepSeek-V3's form, and checks of what an engine answers."""

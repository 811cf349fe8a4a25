"""Publication: the Hub and serving engines."""

"""Version of the package."""

__version__ = "0.2.0"

# The newest and the oldest versions that the tests have run with.
TRIED_TRANSFORMERS = "5.24.0"
OLDEST_TRANSFORMERS = "5.17.0"

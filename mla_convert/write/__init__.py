"""A converted folder on disk: writing, revising, checking and trying it."""

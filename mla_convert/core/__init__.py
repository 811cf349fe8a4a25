"""Settings, units, files, errors, progress: shared by every room, importing none of them."""

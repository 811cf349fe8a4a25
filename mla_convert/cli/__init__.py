"""The commands of `mla-convert`, one file each: they read options, call the library and print. Import no torch."""

"""Stage types: one file each, config class and wiring, no mathematics."""

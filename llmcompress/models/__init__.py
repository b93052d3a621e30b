"""Model layouts, checkpoints, block-by-block execution."""

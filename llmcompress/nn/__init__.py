"""Run-time modules that hold packed weights."""

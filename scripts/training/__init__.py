"""Training of the reference models: data, models, scan, loop."""

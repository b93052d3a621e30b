"""Several processes on one run: who they are, what they exchange, who owns which work."""

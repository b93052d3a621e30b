"""An OpenAI-compatible HTTP server over one artifact: a family's members, or a single model."""

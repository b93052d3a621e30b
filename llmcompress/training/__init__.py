"""Training of small behaviours into existing models: supervised and by reinforcement, deterministic and resumable."""

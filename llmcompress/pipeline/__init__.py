"""Executes a recipe: order, resume, events, estimates."""

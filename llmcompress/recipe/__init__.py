"""Recipes: load, compose, validate, diagnose, lock."""

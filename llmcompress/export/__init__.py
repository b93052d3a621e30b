"""Exporters: each states its refusal reasons first."""

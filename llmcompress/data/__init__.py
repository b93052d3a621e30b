"""Calibration data and evaluation tasks."""

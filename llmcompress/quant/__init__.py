"""Specs, rules, bit packing and storage of quantized weights."""

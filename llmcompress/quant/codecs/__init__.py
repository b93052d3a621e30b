"""Codecs: how a PackedWeight stores its numbers."""

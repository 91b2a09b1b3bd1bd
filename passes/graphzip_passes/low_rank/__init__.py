"""Layers as products of thinner ones."""

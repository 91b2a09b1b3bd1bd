"""Layers whose weights are computed from other tensors."""

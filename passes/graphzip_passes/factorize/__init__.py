"""Factored kernels: atoms and coefficients (ACDC), slices from codes (CSG)."""

"""Cluster-merge (C-SGD)."""

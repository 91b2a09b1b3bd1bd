"""Multi-model zipping (MTZ)."""

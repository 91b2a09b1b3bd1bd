"""Cross-domain weight sharing."""

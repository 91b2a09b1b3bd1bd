"""Taking out what a network holds for nothing."""

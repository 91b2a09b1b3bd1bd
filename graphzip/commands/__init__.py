"""The command line: built on the public names alone."""

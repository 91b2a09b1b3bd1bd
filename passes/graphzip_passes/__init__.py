"""One file per pass: it decides which channels, neurons or weights go; `graphzip.rewrite` carries it out."""

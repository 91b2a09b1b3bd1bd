"""Plain numbers: least squares and factorisations, moments, rows of what layers read."""

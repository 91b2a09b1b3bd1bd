"""One form for every graph: flat, functional, and made of the operators that the table of operators knows."""

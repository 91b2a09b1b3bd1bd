"""Random models, random plans, and what must hold of them."""

"""The manual: its pages run, its pictures are drawn, its tutorials become notebooks, its site is built."""

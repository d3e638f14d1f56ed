"""Data sets that the project describes or draws itself."""

from data.shapes import draw_shapes

# What ``generate:`` in a data set YAML may name; a generator is called with the data set's folder.
GENERATORS = {"shapes": draw_shapes}

__all__ = ["GENERATORS"]

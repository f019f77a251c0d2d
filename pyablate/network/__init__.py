"""A model as a graph of ATen operators, and the tensors in it that hold units."""

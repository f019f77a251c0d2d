"""The delta engine: one clean run of a batch, and the differences of all ablations."""

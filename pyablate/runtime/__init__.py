"""Process, host and device: locks, interrupts, memory, chunk sizes, processes."""

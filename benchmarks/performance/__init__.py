"""Time, memory, precision, and scale."""

"""Differential equations and small fits: time to an error, and the error at equal seconds."""

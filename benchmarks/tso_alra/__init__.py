"""Preconditioning first, SGD later; what refreshing factors costs; a peer."""

"""Kronecker-factored Fisher matrices, from the loss closure alone."""

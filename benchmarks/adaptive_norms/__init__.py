"""Trust regions and norms that follow the gradients."""

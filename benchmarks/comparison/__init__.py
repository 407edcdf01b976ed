"""Every method on one task, each tuned on the same budget."""

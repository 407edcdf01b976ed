"""The optimisers, one method a file, and what they share."""

"""Loss surfaces between the minima that optimisers find."""

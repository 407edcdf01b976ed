"""What the loss looks like: slices, spectra, comparisons of networks."""

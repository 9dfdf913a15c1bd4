"""Learning the probabilities that a teacher gives each token."""

"""What a model is worth: log-probabilities of given texts, losses by position, benchmarks."""

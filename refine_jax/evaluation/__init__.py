"""Scores, intervals, harnesses: what a model's answers are worth."""

"""Tests, in folders as what they test; what they share lies here."""

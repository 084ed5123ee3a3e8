"""Losses: pure arithmetic on log-probabilities and scores. No model is called here."""

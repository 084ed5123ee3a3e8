"""Reinforcement-learning arithmetic: advantages, KL, rewards. No model is called here."""

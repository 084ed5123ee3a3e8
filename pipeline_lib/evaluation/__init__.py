"""Measuring models, weighing the evidence, telling the story."""

"""Prefline measured side by side with a peer."""

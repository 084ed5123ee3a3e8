"""Prefline as a library: plain Python that knows nothing of Prefect."""

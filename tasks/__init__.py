"""Prefect tasks: thin wrappers that give a stage retries, progress and a state."""

"""Rows: reading, mapping, filtering, deduplicating and dividing them. Nothing here needs torch."""

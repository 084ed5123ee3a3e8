"""Text into token ids and batches."""

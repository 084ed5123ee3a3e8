"""Artifacts, pointers, leases and checkpoints in S3. The only package that imports boto3."""

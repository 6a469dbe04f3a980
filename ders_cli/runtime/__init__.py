"""Torch modules that run, and train, experts as a shared base plus light deltas."""

"""Saved reports: what they hold, how they are made of a conversion, shown and compared."""

"""ders: one shared base and light deltas for the experts of an upcycled Mixture-of-Experts checkpoint."""

__version__ = "0.1.0"

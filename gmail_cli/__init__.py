"""gmail: learning from generated images (GMAIL, ICML 2025)."""

__version__ = "0.1.0"

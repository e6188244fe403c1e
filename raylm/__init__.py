"""raylm: from raw text to translated and summarised files, on one laptop or a cluster of GPUs."""

__version__ = "0.1.0"

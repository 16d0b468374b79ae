"""Neural networks that decide, input by input, how much to compute, and that really skip what they decide to skip."""

__version__ = "0.1.0"

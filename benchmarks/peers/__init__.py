"""Variants that are measured against ours: code in torch and Triton, and installed packages."""

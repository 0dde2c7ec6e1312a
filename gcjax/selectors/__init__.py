"""Selectors: which compression level every layer gets."""

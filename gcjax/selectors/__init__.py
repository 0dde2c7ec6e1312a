"""Selectors: which compression level every layer, or every worker, gets."""

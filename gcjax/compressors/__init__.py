"""Compressors: local and pure, one file per family. None of them communicates."""

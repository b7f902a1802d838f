"""Counts as images."""

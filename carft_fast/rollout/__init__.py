"""Sampling completions: one interface, an engine a file, weights in, completions out."""

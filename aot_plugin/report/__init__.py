"""Seeing the dominance: statistics, quantile plots and comparisons of runs."""

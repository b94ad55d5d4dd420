"""Recurrences and short convolutions over the rows of a step, for all sequences at once."""

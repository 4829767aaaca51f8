"""Whole experiments: the loop, its live view and its picture."""

"""Measuring: contestants that take turns, and what is made of their figures."""

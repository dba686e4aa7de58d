"""Measurements of our code side by side with a plain alternative. `make bench` runs them."""

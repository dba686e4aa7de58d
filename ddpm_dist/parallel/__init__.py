"""Ranks, what they agree on, and the randomness that does not depend on them."""

"""Networks, and moving averages of their weights."""

"""Networks, and the average of their weights."""

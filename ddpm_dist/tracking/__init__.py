"""metrics.jsonl is the truth; the shipper, a process of its own, mirrors it into MLflow."""

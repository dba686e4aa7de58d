"""Pictures and figures from a trained model."""

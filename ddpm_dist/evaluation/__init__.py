"""Images from a trained model, and the pictures that show them."""

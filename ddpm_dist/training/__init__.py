"""One attempt at a run: where it starts, the training step, the loop around it, and how it ends."""

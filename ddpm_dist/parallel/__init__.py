"""Ranks and all that they do together; the only wing that imports torch.distributed."""

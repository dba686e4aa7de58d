"""The mathematics of DDPM: pure functions of tensors and callables, which know no rank, no file and no config."""

"""The mathematics of DDPM: pure functions of tensors and callables. Knows no rank, no file, no config."""

"""Train denoising diffusion models on clusters: the same command starts, resumes and finishes a run."""

__version__ = "0.1.0"

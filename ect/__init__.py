"""Easy Consistency Tuning: turn a pretrained diffusion model into a one- or two-step sampler (arXiv 2406.14548)."""

__version__ = "0.2.0"

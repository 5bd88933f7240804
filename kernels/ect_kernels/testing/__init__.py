"""Proofs of the ops: truth in fp64, and the CPU emulator of CUDA."""

"""How ops are proved: truth in fp64, and the CPU emulator of CUDA."""

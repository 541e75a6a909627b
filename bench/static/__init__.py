"""What the compilers make of the Triton kernels, ours and public ones, read in the machine code with no GPU at hand."""

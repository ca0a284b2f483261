"""Speed, memory and energy of kernels and of models, on the machine at hand."""

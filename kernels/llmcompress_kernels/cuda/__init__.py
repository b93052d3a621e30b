"""CUDA C++ kernels: built at first use where there is a CUDA compiler and a GPU, checked without one elsewhere."""

"""The backend for GPUs: three Triton kernels a call, norms, match and merge; no similarity is ever stored."""

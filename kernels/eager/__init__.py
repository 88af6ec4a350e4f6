"""The backend that runs wherever PyTorch does: library matrix products over bounded chunks, no compiled code."""

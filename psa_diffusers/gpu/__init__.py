"""What the Triton kernels of the planner and of the attention backend share."""

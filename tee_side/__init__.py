"""The trusted side: everything private, from the prompt to the sampled token. It knows nothing of gpu_side."""

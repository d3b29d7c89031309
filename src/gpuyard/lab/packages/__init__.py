"""The simulated NVIDIA packages of the lab."""

"""What tools/setup is made of. Standard library and Python 3.9: it runs before there is anything else."""

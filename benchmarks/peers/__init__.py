"""What is measured beside ours: forms in torch and Triton, and installed packages."""

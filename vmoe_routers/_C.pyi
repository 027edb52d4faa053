torch_target: str
cuda_built: bool
cuda_architectures: str

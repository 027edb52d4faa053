"""Checkpoints: saves and loads models, and reads the checkpoints of the reference code without JAX."""

from vmoe_routers.checkpoints.error import CheckpointError
from vmoe_routers.checkpoints.flax import load_flax
from vmoe_routers.checkpoints.npz import read_npz
from vmoe_routers.checkpoints.pretrained import from_pretrained, save_pretrained
from vmoe_routers.checkpoints.vmoe import read_vmoe

__all__ = ["CheckpointError", "from_pretrained", "load_flax", "read_npz", "read_vmoe", "save_pretrained"]

"""Parameters from elsewhere: the reference code's flax arrays into modules of this package."""

from vmoe_routers.checkpoints.flax import load_flax

__all__ = ["load_flax"]

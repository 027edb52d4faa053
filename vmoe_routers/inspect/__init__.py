"""Inspection of the routing of a model."""

from vmoe_routers.inspect.record import Trace, record

__all__ = ["Trace", "record"]

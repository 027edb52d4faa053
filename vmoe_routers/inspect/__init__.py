"""Inspection of the routing of a model."""

from vmoe_routers.inspect.record import Trace, record
from vmoe_routers.inspect.statistics import RoutingStatistics

__all__ = ["RoutingStatistics", "Trace", "record"]

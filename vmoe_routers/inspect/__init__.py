"""Inspection of the routing of a model: statistics by layer, and pictures."""

from vmoe_routers.inspect.layer import LayerTrace
from vmoe_routers.inspect.record import record
from vmoe_routers.inspect.statistics import RoutingStatistics
from vmoe_routers.inspect.trace import Trace

__all__ = ["LayerTrace", "RoutingStatistics", "Trace", "record"]

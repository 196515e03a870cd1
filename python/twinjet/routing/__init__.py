"""Which deployment answers: routes with weights, fallback, stickiness and mirror, changed while the server runs."""

from twinjet.routing.table import RevisionChanged, Route, RoutingTable

__all__ = ["RevisionChanged", "Route", "RoutingTable"]

"""Decides who goes next, for every engine: admission, fairness, deadlines and the KV ledger."""

from twinjet.scheduler.dispatcher import Dispatcher
from twinjet.scheduler.events import DispatchedEvent, QueuedEvent, SchedulerLoad, TenantReading
from twinjet.scheduler.orca import DeploymentLoad, OrcaReport, ServedLoad
from twinjet.scheduler.settings import SchedulerSettings, TenantSettings

__all__ = [
    "DeploymentLoad",
    "DispatchedEvent",
    "Dispatcher",
    "OrcaReport",
    "QueuedEvent",
    "SchedulerLoad",
    "SchedulerSettings",
    "ServedLoad",
    "TenantReading",
    "TenantSettings",
]

"""Decides who goes next, for every engine: admission, fairness, deadlines and the KV ledger."""

from twinjet.scheduler.dispatcher import Dispatcher
from twinjet.scheduler.events import DispatchedEvent, QueuedEvent, SchedulerLoad, TenantReading
from twinjet.scheduler.orca import OrcaReport, orca_report
from twinjet.scheduler.settings import SchedulerSettings, TenantSettings

__all__ = [
    "DispatchedEvent",
    "Dispatcher",
    "OrcaReport",
    "QueuedEvent",
    "SchedulerLoad",
    "SchedulerSettings",
    "TenantReading",
    "TenantSettings",
    "orca_report",
]

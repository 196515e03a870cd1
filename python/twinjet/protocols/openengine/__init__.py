"""OpenEngine v1 (proto/openengine/v1), which Dynamo's sidecars speak.

requests.py   an openengine.v1.GenerateRequest as a twinjet.v1 one, and where in the former a mistake of the latter is
events.py     the events of a twinjet.v1 stream as those of OpenEngine
inference.py  openengine.v1.Inference on top of InferenceService
control.py    openengine.v1.Control: what the server and its models are and can do, health, load, abort, adapters
kv.py         openengine.v1.Control's KV events, from an engine's journal
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinjet.protocols.openengine.control import ControlServicer
from twinjet.protocols.openengine.inference import InferenceServicer, Running
from twinjet.protocols.openengine.v1 import openengine_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor

    from twinjet.config import Config
    from twinjet.server.deployments import Deployments
    from twinjet.server.inference import InferenceServicer as OurInference
    from twinjet.server.models import ModelServicer


def servicers(
    config: Config, deployments: Deployments, inference: OurInference, models: ModelServicer
) -> list[tuple[ServiceDescriptor, object]]:
    """Make the protocol's services."""
    running = Running()
    services = openengine_pb2.DESCRIPTOR.services_by_name
    settings = config.protocols.openengine
    return [
        (services["Inference"], InferenceServicer(inference, deployments, settings, running)),
        (services["Control"], ControlServicer(deployments, models, running, config.admin.token)),
    ]

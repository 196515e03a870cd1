"""The endpoint picker: tells Envoy, by its ext_proc protocol, which replica a request should go to.

wire, frames      bytes of Envoy's and gRPC's protocols          settings   what can be configured
picking           which replica and why, or why none; pure       sources    which replicas there are
watching          what replicas tell of themselves               servicer   one ext_proc stream
main              the process
"""

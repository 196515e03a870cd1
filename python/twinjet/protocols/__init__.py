"""Protocols of others, each in a folder of its own: translations onto the requests of twinjet.v1, switched on by configuration."""

"""Packs the service for a machine without a network, and installs it there."""

"""Gives a model process that is started with this folder on its PYTHONPATH a simulated device of its own.

It computes SIMULATED_TOKENS_PER_SECOND, padding included, and its vectors are made up.
"""

import os
import sys

if "embedding_service.sharing.server" in sys.orig_argv:
    from embedding_service.inference import local

    load = local._load_model

    def simulated(settings):
        from benchmarks.simulated_device import Device, on_device

        speed = float(os.environ["SIMULATED_TOKENS_PER_SECOND"])
        return on_device(load(settings), Device(speed, launch_seconds=0.0005), streams=2)

    local._load_model = simulated

"""The machine a run is on: its device, its driver, its processes, and whether it computes right."""

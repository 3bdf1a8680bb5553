"""What Ray's Prometheus endpoints say of our metrics."""

import urllib.request
from collections.abc import Iterator

import ray

PATIENCE = 60.0
"""Seconds that an exported metric may take to appear."""


def scrape() -> Iterator[str]:
    """The lines of our metrics at the Prometheus endpoint of each node."""
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                yield from (line for line in answer.read().decode().splitlines() if "personaspace_" in line)

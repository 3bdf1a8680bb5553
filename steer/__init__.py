"""Steering and capping along the axis: interventions, sweeps, evaluations, a live page, and a server."""

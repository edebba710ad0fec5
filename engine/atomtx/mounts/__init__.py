"""Mounts: what the machine has, and how a run shows its snapshots to the client."""

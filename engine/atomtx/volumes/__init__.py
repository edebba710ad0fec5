"""What a snapshot can be taken of: find, snapshot, probe, hold, release, destroy."""

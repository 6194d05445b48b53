"""Snapshots: this project's, those of other projects, exchange formats, and what is copied from one to a network."""

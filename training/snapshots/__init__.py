"""Snapshots of this and other projects, exchange formats, and transfer learning from a snapshot."""

"""What keeps a run alive on disk and under signals."""

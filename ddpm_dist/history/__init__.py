"""What happened to a run, read from its files afterwards: its attempts, their nodes, and a report. No torch."""

"""What happened to a run: its attempts, the nodes they ran on, and a report; read after the fact, without torch."""

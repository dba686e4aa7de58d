"""What happens before a run: submitting it (submit) and looking whether it can work (doctor). Used from a checkout."""

"""What a person reads: reports, tables and pictures."""

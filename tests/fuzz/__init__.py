"""Coverage-guided fuzzing of what reads foreign bytes, and the cases kept from it."""

"""The emulator, spoken to by raw HTTP."""

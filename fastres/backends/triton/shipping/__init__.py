"""Plans and machine code that travel with a saved engine."""

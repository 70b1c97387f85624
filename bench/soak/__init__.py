"""What is tried by ten thousands: damage, forgeries, kills and leaks; each program stands alone."""

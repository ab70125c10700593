"""What exists only for speed on CPUs."""

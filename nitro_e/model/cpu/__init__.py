"""The code that exists only for speed on CPUs."""

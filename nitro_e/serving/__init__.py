"""The page of `nitro-e serve`: what it draws (drawing.py) and how it looks (page.py)."""

"""Making data: packing, encoding, verifying, drawing pairs with a teacher."""

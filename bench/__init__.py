"""Measured claims: each file prints one table. Nothing in the product imports them."""

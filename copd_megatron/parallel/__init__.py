"""Ranks: where they stand, which groups they form, how they talk, and noise that does not depend on them."""

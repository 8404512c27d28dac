"""The shipped small models, and how they are made."""

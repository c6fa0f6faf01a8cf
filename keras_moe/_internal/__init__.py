"""Private modules: nothing here is meant for users, and any of it may change."""

"""Chat page that compares a base model and its adapters token by token, as a single HTML document."""

"""Data loading: sources, row formats, chat templates, loss masks and reports of preparation."""

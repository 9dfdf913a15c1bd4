"""Terminal output, tables, figures and HTML pages about plans, runs, adapters and experiments."""

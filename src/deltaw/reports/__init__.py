"""What a person sees: progress on a terminal, and tables and figures of plans, adapters and experiments."""

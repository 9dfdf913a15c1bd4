"""What a run watches while it trains: evaluations, the best of them, answers, warnings, the time left."""

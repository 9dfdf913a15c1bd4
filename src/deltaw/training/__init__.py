"""The training of an adapter: loop, objective, optimizer, schedule."""

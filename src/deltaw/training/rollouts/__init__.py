"""Rollouts: sampling completions from the policy, scoring them, and policy losses."""

"""A training over several processes, as ``torchrun`` starts them: who they are, and what travels."""

"""Training over several processes started by ``torchrun``: connection, communication and gradient sums."""

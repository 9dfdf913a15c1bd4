"""Hot operators on tensors. Each is tested against a reference implementation in torch."""

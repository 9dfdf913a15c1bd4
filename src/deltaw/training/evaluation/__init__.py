"""How good a model is on examples it was not trained on."""

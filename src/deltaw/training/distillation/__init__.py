"""Knowledge distillation from teacher models."""
